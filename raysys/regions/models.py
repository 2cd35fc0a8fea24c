"""The networks' files: which, where, and how a session on one is opened.

In: :class:`raysys.config.OcrConfig`. Out: paths and hashes of detector and recogniser, ONNX Runtime sessions, and folders that
PaddleOCR takes for its ``model_dir``. Sessions cannot be pickled: build them in the actor.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime
import yaml

from raysys.config import OcrConfig
from raysys.storage import UserError, sha256_file

_WHEEL = "rapidocr_onnxruntime"


@dataclass
class ModelFiles:
    det: str
    rec: str
    paddle_det_name: str = "PP-OCRv4_mobile_det"
    paddle_rec_name: str = "PP-OCRv4_mobile_rec"

    def sha256(self) -> dict[str, str]:
        """File name -> hash: the models' part of the annotations' fingerprint."""
        return {os.path.basename(path): sha256_file(path) for path in (self.det, self.rec)}


def find_models(ocr: OcrConfig) -> ModelFiles:
    """:raises UserError: where a file is missing."""
    if ocr.model_dir is not None:
        files = ModelFiles(os.path.join(ocr.model_dir, "det.onnx"), os.path.join(ocr.model_dir, "rec.onnx"))
        for path in (files.det, files.rec):
            if not os.path.isfile(path):
                raise UserError(f"ocr.model_dir={ocr.model_dir}: {os.path.basename(path)} is not there")
        return files
    spec = importlib.util.find_spec(_WHEEL)
    if spec is None or spec.origin is None:
        raise UserError("the OCR models are missing: pip install rapidocr-onnxruntime, or give ocr.model_dir=FOLDER")
    folder = Path(spec.origin).parent / "models"
    return ModelFiles(str(folder / "ch_PP-OCRv4_det_infer.onnx"), str(folder / "ch_PP-OCRv4_rec_infer.onnx"))


def onnx_session(path: str, *, gpu: bool) -> onnxruntime.InferenceSession:
    """:raises UserError: where a GPU is asked for and ONNX Runtime has none (it would fall back to the CPU in silence)."""
    if gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        raise UserError("ocr.num_gpus_per_actor > 0 needs onnxruntime-gpu; this ONNX Runtime has no CUDAExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CUDAExecutionProvider" if gpu else "CPUExecutionProvider"])


def rec_characters(path: str) -> list[str]:
    """Classes of the recogniser: blank, the characters in the model's metadata, space."""
    session = onnx_session(path, gpu=False)
    return ["", *_characters_of(session), " "]


def _characters_of(session: onnxruntime.InferenceSession) -> list[str]:
    listed = session.get_modelmeta().custom_metadata_map.get("character")
    if listed is None:
        raise UserError("rec.onnx: its metadata has no 'character' list (rapidocr's exports have one)")
    return listed.splitlines()


def paddle_det_folder(models: ModelFiles) -> str:
    """The detector as PaddleOCR wants it (docs: PaddleX, inference.yml)."""
    return _paddle_folder(
        models.det,
        {
            "Global": {"model_name": models.paddle_det_name},
            "PreProcess": {
                "transform_ops": [
                    {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                    {"DetResizeForTest": {"resize_long": 960}},
                    {
                        "NormalizeImage": {
                            "mean": [0.485, 0.456, 0.406],
                            "std": [0.229, 0.224, 0.225],
                            "scale": "1./255.",
                            "order": "hwc",
                        }
                    },
                    {"ToCHWImage": None},
                ]
            },
            "PostProcess": {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "max_candidates": 1000, "unclip_ratio": 1.5},
        },
    )


def paddle_rec_folder(models: ModelFiles) -> str:
    """The recogniser as PaddleOCR wants it; its characters come from the ONNX file's metadata."""
    return _paddle_folder(
        models.rec,
        {
            "Global": {"model_name": models.paddle_rec_name},
            "PreProcess": {
                "transform_ops": [
                    {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}},
                    {"RecResizeImg": {"image_shape": [3, 48, 320]}},
                ]
            },
            "PostProcess": {"name": "CTCLabelDecode", "character_dict": _characters_of(onnx_session(models.rec, gpu=False))},
        },
    )


def _paddle_folder(onnx_file: str, recipe: dict[str, Any]) -> str:
    """A folder with ``inference.onnx`` and ``inference.yml``, shared by all processes of this machine and user."""
    text = yaml.safe_dump(recipe, allow_unicode=True)
    mark = hashlib.sha256(f"{sha256_file(onnx_file)}{text}".encode()).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"raysys-{os.getuid()}-paddle" / mark
    folder.mkdir(parents=True, exist_ok=True)
    link = folder / "inference.onnx"
    if not link.exists():
        unfinished = folder / f".onnx-{os.getpid()}"
        unfinished.symlink_to(os.path.abspath(onnx_file))
        unfinished.replace(link)
    unfinished = folder / f".yml-{os.getpid()}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(folder / "inference.yml")
    return str(folder)
