"""How much arithmetic training asks for, and how much a device could do: model FLOPs utilisation (MFU, arXiv:2204.02311, appendix B).

In: a model and the shape of a sample, or a device's name. Out: FLOPs, counted by torch's own operators on tensors without data. Counted
are products of matrices and convolutions of the two towers, as everyone counts them; the loss and what a second pass costs (micro-batches,
gradient checkpointing) are not work of the model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

_PEAK_TFLOPS_BF16 = {
    "B200": 2250.0,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "L40S": 362.05,
    "L40": 181.05,
    "L4": 121.0,
    "A10G": 70.0,
    "A10": 125.0,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}
"""Words of the device's name -> dense bfloat16 TFLOP/s with sums in float32, from NVIDIA's data sheets; the first that fits counts."""


@dataclass(frozen=True)
class Utilisation:
    """What is made of a worker's device."""

    flops_per_sample: float | None
    """None where they cannot be counted."""
    peak_tflops: float | None
    """Of the device; None where it is not known."""

    def metrics(self, samples_per_s: float) -> dict[str, float]:
        """:param samples_per_s: of one worker. :returns: ``tflops``, the model's TFLOP/s, and ``mfu``, their share of the peak."""
        if self.flops_per_sample is None:
            return {}
        tflops = self.flops_per_sample * samples_per_s / 1e12
        return {"tflops": tflops} | ({"mfu": tflops / self.peak_tflops} if self.peak_tflops else {})


def flops_per_sample(model: nn.Module, image_px: int, context_length: int) -> float | None:
    """FLOPs (a multiplication with its addition is two) to train on one pair: forward, and twice that for the way back of each tower
    that is trained, wholly or in part. The model's own weights, statistics and mode stay as they are.

    None for models that look into their data: Hugging Face's text towers do, at the padding.
    """
    state = {name: torch.empty_like(tensor, device="meta") for name, tensor in [*model.named_parameters(), *model.named_buffers()]}
    images = torch.empty(2, 3, image_px, image_px, device="meta")
    texts = torch.empty(2, context_length, dtype=torch.long, device="meta")
    was_training = model.training
    model.train()  # patch dropout
    try:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            functional_call(model, state, kwargs={"image": images, "text": texts})
    except RuntimeError as error:
        if "meta tensors" not in str(error):
            raise
        return None
    finally:
        model.train(was_training)
    of_modules = {name.partition(".")[2]: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    of_image = of_modules.get("visual", 0)
    of_text = counter.get_total_flops() - of_image
    image_weights = {id(p) for name, p in model.named_parameters() if name.startswith("visual.")}
    trained = [
        id(p) in image_weights for p in model.parameters() if p.requires_grad and p.ndim > 0
    ]  # the logit scale is no tower's
    # two samples, as batch norm refuses one whose picture is a pixel
    return (of_image * (3 if True in trained else 1) + of_text * (3 if False in trained else 1)) / 2


def peak_tflops(device_name: str) -> float | None:
    """Most dense bfloat16 TFLOP/s of a card, by ``torch.cuda.get_device_name``; None where it is not known."""
    return next((peak for part, peak in _PEAK_TFLOPS_BF16.items() if re.search(rf"\b{part}\b", device_name)), None)
