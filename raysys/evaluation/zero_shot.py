"""Zero-shot classification: prompts -> classifier -> ranks. Pure torch, in blocks.

In: normalised embeddings. Out: the classifier [C, D], the best class of each picture, and the rank of any other.
Leaves decoding and encoding to :mod:`raysys.evaluation.evaluator`, accuracies to :mod:`raysys.evaluation.metrics`.
Shapes: N pictures, C classes, T templates, D embedding, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import normalize

BLOCK = 4096  # pictures at a time: 4,096 x 1,000 float32 is 16 MB


def prompts(class_names: list[str], templates: list[str]) -> list[str]:
    """Every template of the first class, then of the second: C * T texts."""
    return [template.replace("{}", name) for name in class_names for template in templates]


def class_embeddings(encode: Callable[[torch.Tensor], torch.Tensor], tokens_CTL: torch.Tensor) -> torch.Tensor:
    """Rows of the classifier: encode every prompt, normalise, mean over the templates, normalise (arXiv:2103.00020, sec. 3.1.4).

    :param encode: int64 [C * T, L] -> embeddings [C * T, D], normalised or not.
    :returns: [C, D], rows of length 1.
    """
    text_CTD = normalize(encode(tokens_CTL.flatten(0, 1)), dim=-1).unflatten(0, tokens_CTL.shape[:2])
    return normalize(text_CTD.mean(dim=1), dim=-1)


def best_class(image_ND: torch.Tensor, classifier_CD: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The class of highest cosine, the first of several: int64 [N], and its cosine [N]."""
    best = [(image_BD @ classifier_CD.T).max(dim=1) for image_BD in image_ND.split(BLOCK)]
    return torch.cat([b.indices for b in best]), torch.cat([b.values for b in best])


def class_ranks(image_ND: torch.Tensor, classifier_CD: torch.Tensor, class_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For each picture the rank of a class among all, 0 is first, equal cosines by class index: int64 [N]; and its cosine [N]."""
    index_C = torch.arange(len(classifier_CD), device=image_ND.device)
    ranks, scores = [], []
    for image_BD, class_B in zip(image_ND.split(BLOCK), class_N.split(BLOCK), strict=True):
        score_BC = image_BD @ classifier_CD.T
        own_B1 = score_BC.gather(1, class_B[:, None])
        before_BC = (score_BC > own_B1) | ((score_BC == own_B1) & (index_C < class_B[:, None]))
        ranks.append(before_BC.sum(dim=1))
        scores.append(own_B1[:, 0])
    return torch.cat(ranks), torch.cat(scores)
