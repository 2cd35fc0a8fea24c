"""Retrieval between pictures and captions, as CLIP_benchmark defines it. Pure torch, in blocks: memory stays flat.

In: normalised embeddings and which picture each caption belongs to. Out: ranks; :mod:`raysys.evaluation.metrics` makes recalls of them.
Shapes: I pictures, T captions, D embedding, B rows of a block.
"""

from __future__ import annotations

import torch

BLOCK = 512  # rows of scores at a time: 512 x 25,000 float32 is 51 MB


def image_ranks(
    image_ID: torch.Tensor, text_TD: torch.Tensor, image_of_text_T: torch.Tensor, *, block: int = BLOCK
) -> torch.Tensor:
    """For each caption the rank of its picture among all pictures, 0 is first: int64 [T].

    Equal scores rank by index, as a stable sort does; so a model that says the same of everything is at chance, not perfect.
    """
    index_I = torch.arange(len(image_ID), device=image_ID.device)
    ranks = []
    for text_BD, own_B in zip(text_TD.split(block), image_of_text_T.split(block), strict=True):
        score_BI = text_BD @ image_ID.T
        own_score_B1 = score_BI.gather(1, own_B[:, None])
        tied_before_BI = (score_BI == own_score_B1) & (index_I < own_B[:, None])
        ranks.append(((score_BI > own_score_B1) | tied_before_BI).sum(dim=1))
    return torch.cat(ranks)


def text_ranks(image_ID: torch.Tensor, text_TD: torch.Tensor, image_of_text_T: torch.Tensor, *, block: int = BLOCK) -> torch.Tensor:
    """For each picture the rank of its best caption among all captions, 0 is first, ties by index: int64 [I]."""
    index_T = torch.arange(len(text_TD), device=text_TD.device)
    index_I = torch.arange(len(image_ID), device=image_ID.device)
    ranks = []
    for image_BD, image_B in zip(image_ID.split(block), index_I.split(block), strict=True):
        score_BT = image_BD @ text_TD.T
        own_BT = image_of_text_T == image_B[:, None]
        best_B1 = score_BT.masked_fill(~own_BT, -torch.inf).amax(dim=1, keepdim=True)
        first_B1 = torch.where(own_BT & (score_BT == best_B1), index_T, len(text_TD)).amin(dim=1, keepdim=True)
        ranks.append(((score_BT > best_B1) | ((score_BT == best_B1) & (index_T < first_B1))).sum(dim=1))
    return torch.cat(ranks)
