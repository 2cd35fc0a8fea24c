"""CLIP's contrastive loss (arXiv:2103.00020, sec. 2.3): each worker compares its own rows with the whole global batch.

In: a worker's features. Out: its part of the global batch's loss and accuracies: the parts of all workers add up to the number that one
worker would find with the whole batch, also where their shares are uneven. DistributedDataParallel takes the mean of gradients, so
what is differentiated is the part times the number of workers.

Shapes: b rows of this worker, B of the global batch, D features.
"""

from __future__ import annotations

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
    """Cross-entropy, mean of both directions and of all rows."""
    image_accuracy: torch.Tensor
    """Share of the pictures whose own text is the nearest."""
    text_accuracy: torch.Tensor
    """Share of the texts whose own picture is the nearest."""


def contrast(features: Features, group: Group) -> Contrast:
    """Two collectives; the logits are those of open_clip's ClipLoss with local_loss and gather_with_grad."""
    image_BD, text_BD = group.gather(features.image_bD), group.gather(features.text_bD)
    of_images_bB = features.scale * features.image_bD @ text_BD.T
    of_texts_bB = features.scale * features.text_bD @ image_BD.T
    if features.bias is not None:
        of_images_bB, of_texts_bB = of_images_bB + features.bias, of_texts_bB + features.bias
    own = torch.arange(group.first, group.first + group.size, device=of_images_bB.device)
    cross_entropies = [functional.cross_entropy(logits_bB, own, reduction="sum") for logits_bB in (of_images_bB, of_texts_bB)]
    return Contrast(
        torch.stack(cross_entropies).sum() / (2 * group.global_batch),
        (of_images_bB.argmax(1) == own).sum() / group.global_batch,
        (of_texts_bB.argmax(1) == own).sum() / group.global_batch,
    )
