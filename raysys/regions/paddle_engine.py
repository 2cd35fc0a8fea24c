"""The engine ``paddle``: PaddleOCR's own TextDetection and TextRecognition, offline, on ONNX Runtime or on paddlepaddle.

Its pictures and lines are those of the other engines; its pre- and post-processing are PaddleOCR's.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np

from raysys.config import OcrConfig
from raysys.errors import UserError
from raysys.regions.detector import Boxes, order_corners
from raysys.regions.models import Model, paddle_folder
from raysys.regions.recognizer import Reading, line_input


def _options(ocr: OcrConfig, model: Model) -> dict[str, Any]:
    """What both networks are opened with. :raises UserError: where the device or paddlepaddle is not there."""
    os.environ.setdefault("PADDLE_PDX_DISABLE_DEVICE_FALLBACK", "True")  # it would take the CPU with a warning only
    static, gpu = ocr.backend == "paddle_static", ocr.num_gpus_per_actor > 0
    if static:
        try:
            import paddle
        except ImportError as error:
            raise UserError("ocr.backend=paddle_static needs: pip install 'raysys[paddle]'") from error
        if gpu and not paddle.device.is_compiled_with_cuda():
            raise UserError(
                "ocr.num_gpus_per_actor > 0 with ocr.backend=paddle_static needs a paddlepaddle that was built for GPUs"
            )
        config: dict[str, Any] = {"cpu_threads": 1}
    else:
        import onnxruntime

        if gpu and "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("ocr.num_gpus_per_actor > 0 needs onnxruntime-gpu; this ONNX Runtime cannot use a GPU")
        config = {"intra_op_num_threads": 1}
    return {
        "model_name": model.name,
        "model_dir": paddle_folder(model, ocr.model_dir, static=static),
        "device": "gpu" if gpu else "cpu",
        "engine": ocr.backend,
        "engine_config": config,
    }


class PaddleDetector:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        options = _options(ocr, model)
        from paddleocr import TextDetection

        self._max_regions = ocr.max_regions
        self._model: Any = TextDetection(
            **options,
            limit_side_len=10_000,  # pictures come at the network's size
            limit_type="max",
            thresh=ocr.pixel_threshold,
            box_thresh=ocr.store_score,
            unclip_ratio=ocr.unclip_ratio,
        )

    def detect(self, images: Sequence[np.ndarray]) -> list[Boxes]:
        return [self._detect(image) for image in images]

    def _detect(self, image: np.ndarray) -> Boxes:
        result = self._model.predict(np.ascontiguousarray(image[:, :, ::-1]), batch_size=1)[0]
        corners = np.array(result["dt_polys"], dtype=np.float32).reshape(-1, 4, 2)
        scores = np.array(result["dt_scores"], dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[: self._max_regions]
        return Boxes(np.array([order_corners(c) for c in corners[best]], np.float32).reshape(-1, 4, 2), scores[best])


class PaddleRecognizer:
    def __init__(self, ocr: OcrConfig, model: Model) -> None:
        options = _options(ocr, model)
        from paddleocr import TextRecognition

        self._model: Any = TextRecognition(**options)

    def read(self, lines: Sequence[np.ndarray]) -> list[Reading]:
        inputs = [line_input(line) for line in lines]  # PaddleOCR finds nothing left to resize and normalises
        return [Reading(r["rec_text"], float(r["rec_score"])) for r in self._model.predict(inputs, batch_size=1)] if inputs else []
