"""Opens what ``ocr.engine`` names: one detector a look and a recogniser, all behind the same two protocols."""

from __future__ import annotations

from dataclasses import dataclass

from raysys.config import OcrConfig
from raysys.regions.cpu_engines import CpuDetector, CpuRecognizer, Network, onnx_network, openvino_network
from raysys.regions.detector import Detector
from raysys.regions.models import Model, find_models
from raysys.regions.recognizer import Recognizer


@dataclass
class Engine:
    detectors: list[Detector]
    """One a look; looks of the same detector share its network."""
    recognizer: Recognizer | None


num_opened = 0
"""Engines that this process has opened: 0 in a sweep, which says so in its manifest."""


def open_engine(ocr: OcrConfig) -> Engine:
    """:raises UserError: where a package, a model or the device is not there; nothing falls back in silence."""
    global num_opened
    num_opened += 1
    models = find_models(ocr)
    detectors = {model.name: _detector(ocr, model) for model in models.detectors}
    return Engine(
        [detectors[model.name] for model in models.detectors], _recognizer(ocr, models.recognizer) if models.recognizer else None
    )


def _detector(ocr: OcrConfig, model: Model) -> Detector:
    if ocr.engine == "torch":
        from raysys.regions.torch_engine import TorchDetector

        return TorchDetector(ocr, model)
    if ocr.engine == "paddle":
        from raysys.regions.paddle_engine import PaddleDetector

        return PaddleDetector(ocr, model)
    return CpuDetector(_network(ocr, model), ocr)


def _recognizer(ocr: OcrConfig, model: Model) -> Recognizer:
    if ocr.engine == "torch":
        from raysys.regions.torch_engine import TorchRecognizer

        return TorchRecognizer(ocr, model)
    if ocr.engine == "paddle":
        from raysys.regions.paddle_engine import PaddleRecognizer

        return PaddleRecognizer(ocr, model)
    return CpuRecognizer(_network(ocr, model), model.characters())


def _network(ocr: OcrConfig, model: Model) -> Network:
    if ocr.engine == "openvino":
        return openvino_network(model, precision=ocr.precision)
    return onnx_network(model, gpu=ocr.num_gpus_per_actor > 0)
