"""The training step and its input on CUDA against themselves on the CPU. No Ray, no open_clip: the model is two small towers."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional

from raysys.config import AugmentConfig, LoopConfig, OptimConfig
from raysys.corpus.index import SampleIndex
from raysys.corpus.order import Order
from raysys.training.group import Group
from raysys.training.ingest import BatchReader
from raysys.training.step import TrainStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch.cuda.is_available() is false: no CUDA device here"),
]
SIZE_PX, BATCH, STEPS = 32, 16, 10


class Towers(nn.Module):
    def __init__(self, *, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image = nn.Sequential(nn.Conv2d(3, 16, 8, 8), nn.GELU(), nn.Flatten(), nn.Dropout(0.0), nn.Linear(256, 16))
        self.text = nn.Sequential(nn.Embedding(100, 16), nn.Flatten(), nn.Linear(64, 16))
        self.logit_scale = nn.Parameter(torch.tensor(2.6))
        self.logit_bias = nn.Parameter(torch.tensor(-10.0)) if biased else None

    def forward(self, image: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, ...]:
        features = functional.normalize(self.image(image), dim=-1), functional.normalize(self.text(text), dim=-1)
        scale = self.logit_scale.exp()
        return (*features, scale) if self.logit_bias is None else (*features, scale, self.logit_bias)


def losses(device: str, *, loss: str = "clip", lock_image: bool = False, **loop: Any) -> list[float]:
    model = Towers(biased=loss == "siglip")
    model.image.requires_grad_(not lock_image)
    step_fn = TrainStep(
        model,
        loss=loss,
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        loop=LoopConfig(**{"precision": "fp32"} | loop),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        freeze_bn_stats=True,
        device=torch.device(device),
        group=Group(0, (BATCH,)),
        steps=STEPS,
    )
    assert device == "cpu" or torch.get_float32_matmul_precision() == "high"
    torch.set_float32_matmul_precision("highest")  # TF32 has 11 bits
    torch.backends.cudnn.allow_tf32 = False
    rng = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (BATCH, 3, SIZE_PX, SIZE_PX), dtype=torch.uint8, generator=rng).contiguous(
        memory_format=torch.channels_last
    )
    texts = torch.randint(0, 100, (BATCH, 4), generator=rng)
    return [step_fn(images, texts, step=step, measure=True)["loss"] for step in range(STEPS)]


@pytest.mark.parametrize("recipe", [{"loss": "clip"}, {"loss": "siglip"}, {"lock_image": True}])
def test_losses_on_the_gpu_are_those_on_the_cpu(recipe: dict[str, Any]) -> None:
    on_cpu = losses("cpu", **recipe)
    assert on_cpu[-1] < on_cpu[0]
    assert losses("cuda", **recipe) == pytest.approx(on_cpu, abs=1e-3)
    assert losses("cuda", **recipe, micro_batch=5) == pytest.approx(on_cpu, abs=1e-3)
    assert losses("cuda", **recipe, precision="amp_bf16") == pytest.approx(on_cpu, abs=0.05)


@pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc, which torch.compile needs")
@pytest.mark.parametrize("micro_batch", [None, 5])
def test_losses_of_a_compiled_model_are_those_on_the_cpu(micro_batch: int | None) -> None:
    assert losses("cuda", compile=True, micro_batch=micro_batch) == pytest.approx(losses("cpu"), abs=1e-3)


def test_batches_come_pinned_and_as_on_the_cpu(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "rows").mkdir()
    data, rows = b"", []
    for number in range(40):
        picture = tmp_path / "picture.jpg"
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (48, 40, 3), dtype=np.uint8)).save(picture)
        rows.append({"offset": len(data), "size": picture.stat().st_size, "caption": [f"number {number}"]})
        data += picture.read_bytes()
    (tmp_path / "a.tar").write_bytes(data)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows" / "a.tar.parquet")
    kept, size = np.array([40]), np.array([len(data)])
    index = SampleIndex({"": str(tmp_path)}, pa.array(["a.tar"]), kept, size, str(tmp_path / "rows"), None, 40)
    order = Order(kept, size, global_batch=16, lanes=4, block_bytes=4e3, window_bytes=1e4, seed=0, factor=0)

    def batches(*, pin_memory: bool) -> list[torch.Tensor]:
        reader = BatchReader(
            index,
            order,
            AugmentConfig(crop_scale_min=0.5),
            lambda captions: torch.tensor([[len(caption)] for caption in captions]),
            size_px=SIZE_PX,
            num_steps=6,
            rank=0,
            world_size=1,
            read_threads=2,
            decode_threads=2,
            prefetch=2,
            pin_memory=pin_memory,
        )
        return [batch.images for batch in reader.batches(0, 6)]

    pinned, plain = batches(pin_memory=True), batches(pin_memory=False)
    assert all(images.is_pinned() for images in pinned)
    assert all(torch.equal(a.to("cuda", non_blocking=True).cpu(), b) for a, b in zip(pinned, plain, strict=True))
