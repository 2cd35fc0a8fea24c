"""The engine ``torch`` on CUDA against itself on the CPU, on drawn text. No Ray; of raysys's extras only what the engine imports.

Networks come from ``RAYSYS_MODEL_DIR`` (a folder with NAME.onnx, see tools/bench_detector.py) or the installed wheels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from raysys.config import OcrConfig
from raysys.errors import UserError
from raysys.regions import torch_engine
from raysys.regions.detector import Detector
from raysys.regions.engine import open_engine
from raysys.regions.models import Model, find_model
from raysys.regions.torch_engine import TorchDetector, TorchRecognizer

MODEL_DIR = os.environ.get("RAYSYS_MODEL_DIR")
DETECTORS = ("PP-OCRv4_mobile_det", "PP-OCRv6_tiny_det")
WORDS = ("Open 24 hours", "SALE 50% off", "Main Street", "HELLO WORLD")
OCR = OcrConfig(engine="torch", model_dir=MODEL_DIR)
_MASK = OCR.pixel_threshold

detectors = pytest.mark.parametrize("name", DETECTORS)


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    reason = "torch.cuda.is_available() is false: no CUDA device here"
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason=reason)(test))


@pytest.fixture(autouse=True)
def exact_fp32() -> Iterator[None]:
    """TF32 rounds the factors of a product to 10 bits; cuDNN's convolutions do so unless told not to."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Detector, Sequence[np.ndarray]], np.ndarray]:
    """What a detector traces contours on, [N, H, W]: every picture has text, so every map comes back."""
    monkeypatch.setattr(torch_engine, "boxes_of_map", lambda prob_HW, ocr: prob_HW.copy())
    return lambda detector, pictures: np.stack(detector.detect(pictures))  # type: ignore[arg-type]


def _ocr(*, gpu: bool, precision: str = "fp32") -> OcrConfig:
    return OcrConfig(engine="torch", model_dir=MODEL_DIR, num_gpus_per_actor=float(gpu), precision=precision)


def _model(name: str) -> Model:
    return find_model(name, MODEL_DIR)


def _pictures() -> list[np.ndarray]:
    """[320, 480, 3] each: dark words on light noise."""
    pictures = []
    for seed, words in enumerate(WORDS):
        picture = Image.fromarray(np.random.default_rng(seed).integers(150, 230, (320, 480, 3), dtype=np.uint8))
        ImageDraw.Draw(picture).text((30, 100), words, fill=(20, 20, 60), font=ImageFont.load_default(48))
        pictures.append(np.asarray(picture))
    return pictures


def _lines() -> list[np.ndarray]:
    font = ImageFont.load_default(36)
    lines = []
    for words in WORDS:
        line = Image.new("RGB", (int(font.getlength(words)) + 24, 56), (235, 235, 225))
        ImageDraw.Draw(line).text((12, 6), words, fill=(20, 20, 60), font=font)
        lines.append(np.asarray(line))
    return lines


def _assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    """The CPU itself is up to 4e-5 from float64 on these pictures; a GPU's kernels add up in another order."""
    apart = np.abs(found - expected)
    assert apart.max() < 1e-3
    assert (apart > 1e-4).mean() < 1e-4


@on_gpu
@detectors
def test_maps_are_those_of_the_cpu(name: str, maps: Callable[..., np.ndarray]) -> None:
    pictures = _pictures()
    expected = maps(TorchDetector(_ocr(gpu=False), _model(name)), pictures)
    assert (expected > _MASK).mean() > 0.02  # there is text to find
    _assert_close(maps(TorchDetector(_ocr(gpu=True), _model(name)), pictures), expected)


@on_gpu
@detectors
def test_batch_is_its_single_pictures(name: str, maps: Callable[..., np.ndarray]) -> None:
    detector, pictures = TorchDetector(_ocr(gpu=True), _model(name)), _pictures()
    _assert_close(maps(detector, pictures), np.concatenate([maps(detector, [picture]) for picture in pictures]))


@on_gpu
@detectors
def test_bf16_finds_the_same_mask(name: str, maps: Callable[..., np.ndarray]) -> None:
    pictures = _pictures()
    exact = maps(TorchDetector(_ocr(gpu=False), _model(name)), pictures) > _MASK
    mask = maps(TorchDetector(_ocr(gpu=True, precision="bf16"), _model(name)), pictures) > _MASK
    assert exact.mean() > 0.02
    assert (mask != exact).mean() < 0.002  # bf16 on a CPU: 0.0001


@on_gpu
def test_pictures_of_several_shapes_keep_their_order() -> None:
    pictures = [picture[:height] for picture, height in zip(_pictures(), (320, 256, 320, 256), strict=True)]
    pictures.insert(2, np.full((320, 480, 3), 200, np.uint8))  # no text: no map comes back
    found, expected = (TorchDetector(_ocr(gpu=gpu), _model(DETECTORS[0])).detect(pictures) for gpu in (True, False))
    assert [len(boxes.scores) for boxes in expected] == [len(boxes.scores) for boxes in found]
    assert len(found[2].scores) == 0
    for boxes, reference in zip(found, expected, strict=True):
        np.testing.assert_allclose(boxes.corners, reference.corners, atol=1)  # corners are rounded to whole pixels
        np.testing.assert_allclose(boxes.scores, reference.scores, atol=1e-3)


@on_gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_readings_are_those_of_the_cpu(precision: str) -> None:
    model = _model(OCR.recognizer)
    expected = TorchRecognizer(_ocr(gpu=False), model).read(_lines())
    found = TorchRecognizer(_ocr(gpu=True, precision=precision), model).read(_lines())
    assert [reading.text for reading in expected] == list(WORDS)
    assert [reading.text for reading in found] == list(WORDS)
    close = 1e-3 if precision == "fp32" else 0.05
    np.testing.assert_allclose([reading.score for reading in found], [reading.score for reading in expected], atol=close)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_a_gpu_that_is_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="num_gpus_per_actor > 0: torch sees no CUDA device"):
        open_engine(_ocr(gpu=True))
