"""FLOPs of a sample against open_clip's own table (docs/model_profile.csv, GFLOPs of the forward pass)."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch

from raysys.training.flops import Utilisation, flops_per_sample, peak_tflops


def on_meta(name: str, **vision: float) -> torch.nn.Module:
    config = open_clip.get_model_config(name)
    config["vision_cfg"] |= vision
    with torch.device("meta"):
        return open_clip.model.CLIP(**config)


@pytest.mark.parametrize(("name", "image_gflops", "text_gflops"), [("ViT-B-16", 35.13, 5.96), ("ViT-B-32", 8.82, 5.96)])
def test_flops_are_those_of_open_clips_table_three_times(name: str, image_gflops: float, text_gflops: float) -> None:
    model = on_meta(name)
    assert (flops_per_sample(model, 224, 77) or 0) / 1e9 == pytest.approx(3 * (image_gflops + text_gflops), abs=0.05)
    model.lock_image_tower()
    assert (flops_per_sample(model, 224, 77) or 0) / 1e9 == pytest.approx(image_gflops + 3 * text_gflops, abs=0.05)
    model.lock_text_tower()
    assert (flops_per_sample(model, 224, 77) or 0) / 1e9 == pytest.approx(image_gflops + text_gflops, abs=0.05)


def test_patches_that_are_dropped_cost_nothing() -> None:
    whole, half = (flops_per_sample(on_meta("ViT-B-16", patch_dropout=share), 224, 77) or 0 for share in (0.0, 0.5))
    of_text = 3 * 5.96e9
    assert 0.48 < (half - of_text) / (whole - of_text) < 0.52


def test_counting_leaves_the_model_as_it_is() -> None:
    model = open_clip.create_model("RN50", pretrained_image=False).eval()
    before = copy.deepcopy(model.state_dict())
    assert (flops_per_sample(model, 224, 77) or 0) / 1e9 == pytest.approx(3 * 18.18, abs=0.05)
    assert not model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class LooksAtItsData(torch.nn.Module):
    def forward(self, image: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return image if (text == 0).all() else image + 1


def test_what_cannot_be_counted_is_none_and_no_metric() -> None:
    assert flops_per_sample(LooksAtItsData(), 32, 16) is None
    assert Utilisation(None, 100.0).metrics(10.0) == {}


def test_utilisation_is_the_share_of_the_peak() -> None:
    assert Utilisation(3e9, 10.0).metrics(1000.0) == {"tflops": 3.0, "mfu": 0.3}
    assert Utilisation(3e9, None).metrics(1000.0) == {"tflops": 3.0}


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA A100-SXM4-40GB", 312.0),
        ("NVIDIA L40S", 362.05),
        ("NVIDIA RTX A1000 6GB", None),
    ],
)
def test_peaks_are_found_by_name(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak
