"""The contrastive losses: each worker compares its own rows with the whole global batch.

In: a worker's features. Out: its part of the global batch's loss and accuracies: the parts of all workers add up to the number that one
worker would find with the whole batch, also where their shares are uneven. Gradients of weights are averaged over the workers, so
what is differentiated is the part times the number of workers.

Shapes: b rows of this worker, B of the global batch, D features.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional

from raysys.training.group import Group


@dataclass(frozen=True)
class Features:
    """What an open_clip model says of pictures and texts."""

    image_bD: torch.Tensor
    """Unit length, like the texts'."""
    text_bD: torch.Tensor
    scale: torch.Tensor
    """exp of the model's ``logit_scale``."""
    bias: torch.Tensor | None
    """The model's ``logit_bias``, where it has one."""


@dataclass(frozen=True)
class Contrast:
    """One worker's parts of the global batch's numbers, scalars; only the loss has a gradient."""

    loss: torch.Tensor
    image_accuracy: torch.Tensor
    """Share of the pictures whose own text is the nearest."""
    text_accuracy: torch.Tensor
    """Share of the texts whose own picture is the nearest."""


def contrast(features: Features, group: Group, loss: str) -> Contrast:
    """Collectives: all workers call it, with the same ``loss``, one of ``config.LOSSES``.

    :raises ValueError: where the model has no part that the loss needs.
    """
    return _LOSSES[loss](features, group)


def _clip(features: Features, group: Group) -> Contrast:
    """Cross-entropy, mean of both directions and of all rows (arXiv:2103.00020, sec. 2.3): open_clip's ClipLoss with local_loss and
    gather_with_grad."""
    of_images_bB = _logits(features, features.image_bD, group.gather(features.text_bD))
    of_texts_bB = _logits(features, features.text_bD, group.gather(features.image_bD))
    own = _own_columns(of_images_bB, group)
    cross_entropies = [functional.cross_entropy(logits_bB, own, reduction="sum") for logits_bB in (of_images_bB, of_texts_bB)]
    loss = torch.stack(cross_entropies).sum() / (2 * group.global_batch)
    return Contrast(loss, _share_of_hits(of_images_bB, group), _share_of_hits(of_texts_bB, group))


def _siglip(features: Features, group: Group) -> Contrast:
    """Log-sigmoid of every pair, summed over all texts, mean of the pictures (arXiv:2303.15343, alg. 1): open_clip's SigLipLoss."""
    if features.bias is None:
        raise ValueError("loss=siglip needs a model with a logit bias: without one nearly all of its pairs start out wrong")
    of_images_bB = _logits(features, features.image_bD, group.gather(features.text_bD))
    with torch.no_grad():
        of_texts_bB = _logits(features, features.text_bD, group.gather(features.image_bD))
    signs_bB = torch.full_like(of_images_bB, -1).scatter_(1, _own_columns(of_images_bB, group)[:, None], 1)
    loss = -functional.logsigmoid(signs_bB * of_images_bB).sum() / group.global_batch
    return Contrast(loss, _share_of_hits(of_images_bB, group), _share_of_hits(of_texts_bB, group))


_LOSSES: dict[str, Callable[[Features, Group], Contrast]] = {"clip": _clip, "siglip": _siglip}


def _logits(features: Features, own_bD: torch.Tensor, all_BD: torch.Tensor) -> torch.Tensor:
    """float32, as the sum over B texts of what bfloat16 leaves of them would be worth little."""
    logits_bB = (features.scale * own_bD @ all_BD.T).float()
    return logits_bB if features.bias is None else logits_bB + features.bias


def _own_columns(logits_bB: torch.Tensor, group: Group) -> torch.Tensor:
    """Where the partners of this worker's rows are, [b]."""
    return torch.arange(group.first, group.first + group.size, device=logits_bB.device)


def _share_of_hits(logits_bB: torch.Tensor, group: Group) -> torch.Tensor:
    """Rows with their partner the nearest, by the global batch."""
    return (logits_bB.argmax(1) == _own_columns(logits_bB, group)).sum() / group.global_batch
