"""One optimisation step of CLIP: forward, contrastive loss over all workers, backward, AdamW.

The recipe is open_clip's: no weight decay on gains, biases and the logit scale; linear warm-up, then cosine to 0; the logit scale is
held at most ln 100.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from open_clip.loss import ClipLoss, gather_features
from torch import nn

from raysys.config import LoopConfig, OptimConfig


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """AdamW with open_clip's two groups (open_clip_train/main.py)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def undecayed(name: str, p: torch.Tensor) -> bool:
        return p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))

    return torch.optim.AdamW(
        [
            {"params": [p for name, p in named if undecayed(name, p)], "weight_decay": 0.0},
            {"params": [p for name, p in named if not undecayed(name, p)], "weight_decay": optim.weight_decay},
        ],
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        fused=True,
    )


def learning_rate(step: int, *, steps: int, optim: OptimConfig) -> float:
    """Linear warm-up to ``optim.lr``, then cosine to 0 at ``steps``; steps count from 0."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, steps - optim.warmup_steps)
    return optim.lr * 0.5 * (1 + math.cos(math.pi * done))


class TrainStep:
    """Model, loss and optimiser of one worker."""

    def __init__(
        self,
        model: nn.Module,
        *,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        loop: LoopConfig,
        optim: OptimConfig,
        device: torch.device,
        rank: int,
        world_size: int,
    ) -> None:
        self.model = model.to(device)
        if loop.channels_last:
            self.model = self.model.to(memory_format=torch.channels_last)
        self._loop, self._optim, self._device = loop, optim, device
        self._rank, self._world_size = rank, world_size
        self._parallel: nn.Module = self.model
        if world_size > 1:
            self._parallel = nn.parallel.DistributedDataParallel(
                self.model, device_ids=[device.index] if device.type == "cuda" else None
            )
        # Each worker's loss is over its own rows against everyone's columns; only with gradients through the gather is
        # the mean over workers the gradient of the whole batch's loss.
        self._loss = ClipLoss(local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world_size)
        self.optimizer = make_optimizer(self.model, optim)
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255

    def __call__(self, images: torch.Tensor, texts: torch.Tensor, *, step: int, measure: bool) -> dict[str, float]:
        """Do step ``step`` on uint8 images [b, 3, S, S] and texts [b, context].

        :param measure: also return the metrics (they wait for the device).
        """
        self.model.train()
        lr = learning_rate(step, steps=self._loop.steps, optim=self._optim)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        images = images.to(self._device, non_blocking=True)
        texts = texts.to(self._device, non_blocking=True)
        pixels = ((images.float() - self._mean) / self._std).contiguous(
            memory_format=torch.channels_last if self._loop.channels_last else torch.contiguous_format
        )
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._loop.precision == "amp_bf16"):
            image_BD, text_BD, scale = self._features(pixels, texts)
            loss = self._loss(image_BD, text_BD, scale)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self._optim.grad_clip_norm or math.inf)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]
        if not measure:
            return {}
        accuracy = self._accuracy(image_BD.detach(), text_BD.detach())
        loss_mean = self._mean_over_workers(loss.detach().float())
        return {"loss": loss_mean, **accuracy, "logit_scale": float(scale.detach()), "lr": lr, "grad_norm": float(norm)}

    def _features(self, pixels: torch.Tensor, texts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Normalised embeddings [b, D] of pictures and texts, and exp(logit scale)."""
        out: Any = self._parallel(pixels, texts)
        if isinstance(out, dict):
            return out["image_features"], out["text_features"], out["logit_scale"]
        return out[0], out[1], out[2]

    def _accuracy(self, image_BD: torch.Tensor, text_BD: torch.Tensor) -> dict[str, float]:
        """Share of this worker's pictures (texts) whose own text (picture) is the nearest of the global batch."""
        all_image, all_text = image_BD, text_BD
        if self._world_size > 1:
            all_image, all_text = gather_features(image_BD, text_BD, rank=self._rank, world_size=self._world_size)
        own = torch.arange(len(image_BD), device=self._device) + self._rank * len(image_BD)
        return {
            "image_accuracy": self._mean_over_workers(((image_BD @ all_text.T).argmax(1) == own).float().mean()),
            "text_accuracy": self._mean_over_workers(((text_BD @ all_image.T).argmax(1) == own).float().mean()),
        }

    def _mean_over_workers(self, value: torch.Tensor) -> float:
        if self._world_size > 1:
            value = value.clone()
            torch.distributed.all_reduce(value)
            value = value / self._world_size
        return float(value)
