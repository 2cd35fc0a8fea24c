"""The evaluator on a GPU against the same on the CPU. Needs neither Ray nor open_clip."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from raysys.config import ClassSetConfig, ServiceConfig
from raysys.evaluation.evaluator import Evaluator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device here"),
]
SIDE_PX, NUM_CLASSES = 64, 8


class TinyClip(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.image = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 8, 8), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.LazyLinear(64))
        self.text = torch.nn.EmbeddingBag(1000, 64)
        self.image(torch.zeros(1, 3, SIDE_PX, SIDE_PX))

    def encode_image(self, image_BCHW: torch.Tensor) -> torch.Tensor:
        return self.image(image_BCHW)

    def encode_text(self, text_BL: torch.Tensor) -> torch.Tensor:
        return self.text(text_BL)


@pytest.fixture
def fruit(tmp_path: Path) -> ClassSetConfig:
    rng = np.random.default_rng(0)
    for label in range(NUM_CLASSES):
        (tmp_path / "set" / f"c{label}").mkdir(parents=True)
        for i in range(40):
            pixels = rng.integers(0, 256, (80, 100, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "set" / f"c{label}" / f"{i}.jpg")
    (tmp_path / "classes.json").write_text(json.dumps({f"c{label}": f"thing {label}" for label in range(NUM_CLASSES)}))
    return ClassSetConfig(path=str(tmp_path / "set"), classes=str(tmp_path / "classes.json"), templates="simple")


@pytest.fixture
def loaded() -> Any:
    torch.manual_seed(0)
    resize = [Resize(SIDE_PX, InterpolationMode.BICUBIC), CenterCrop(SIDE_PX)]
    return SimpleNamespace(
        model=TinyClip(),
        preprocess=Compose([*resize, ToTensor(), Normalize((0.48, 0.46, 0.41), (0.27, 0.26, 0.28))]),
        tokenizer=lambda texts: torch.tensor([[(7 * ord(c)) % 1000 for c in text[-12:]] for text in texts]),
        config={"embed_dim": 64, "text_cfg": {"context_length": 12}},
        name="tiny",
    )


@pytest.mark.parametrize("precision", ["fp32", "amp_bf16"])
def test_gpu_gives_the_embeddings_of_the_cpu(precision: str, fruit: ClassSetConfig, loaded: Any, tmp_path: Path) -> None:
    service = ServiceConfig(batch_size=32, cache_dir=str(tmp_path / "cache"))
    on_cpu = Evaluator({"imagenet": fruit}, service).embed(loaded, "imagenet")
    evaluator = Evaluator({"imagenet": fruit}, replace(service, precision=precision), device="cuda", threads=4)
    on_gpu = evaluator.embed(loaded, "imagenet")
    tolerance = 1e-3 if precision == "fp32" else 3e-2  # TF32 is off by default; cuDNN's convolutions may use it
    for what in ("image_ND", "text_TD"):
        assert getattr(on_gpu, what)["imagenet"] == pytest.approx(getattr(on_cpu, what)["imagenet"], abs=tolerance)
    assert evaluator.answer("imagenet", [on_gpu]).metrics["num_pictures"] == NUM_CLASSES * 40
