"""AdamW and its learning rate: open_clip's recipe (open_clip_train/main.py and scheduler.py).

In: a model and ``OptimConfig``. Out: its optimiser, and the learning rate of a step. Which weights are trained is the model's business
(``requires_grad``); clipping and the logit scale's bounds are the step's.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from raysys.config import OptimConfig


def make_optimizer(model: nn.Module, optim: OptimConfig) -> torch.optim.AdamW:
    """No weight decay on gains, biases and the logit scale. Groups hold FSDP2's sharded weights or others: a fused step takes no mixture."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            undecayed = p.ndim < 2 or any(part in name for part in ("bn", "ln", "bias", "logit_scale"))
            groups.setdefault((undecayed, isinstance(p, DTensor)), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": 0.0 if undecayed else optim.weight_decay} for (undecayed, _), ps in groups.items()],
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
