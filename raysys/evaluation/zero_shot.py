"""Zero-shot classification: prompts -> classifier -> metrics, as CLIP_benchmark defines them. Pure torch.

In: normalised embeddings. Out: the classifier [C, D], the top classes of each picture, and metrics as fractions.
Leaves decoding and encoding to :mod:`raysys.evaluation.evaluator`.
Shapes: N pictures, C classes, T templates, D embedding, K best classes, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import normalize


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


def best_classes(image_ND: torch.Tensor, classifier_CD: torch.Tensor, k: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """The K = min(k, C) classes of highest cosine, best first: scores [N, K] and classes [N, K]."""
    scores_NK, classes_NK = (image_ND @ classifier_CD.T).topk(min(k, len(classifier_CD)), dim=1)
    return scores_NK, classes_NK


def classification_metrics(best_NK: torch.Tensor, label_N: torch.Tensor) -> dict[str, float]:
    """``acc1``, ``acc5`` (hit in the first 5), ``mean_per_class_recall`` over classes with pictures."""
    hit_NK = best_NK == label_N[:, None]
    first_N = hit_NK[:, 0].double()
    recalls = [first_N[label_N == label].mean() for label in label_N.unique()]
    return {
        "acc1": first_N.mean().item(),
        "acc5": hit_NK[:, :5].any(dim=1).double().mean().item(),
        "mean_per_class_recall": torch.stack(recalls).mean().item(),
    }


def attack_metrics(
    best_NK: torch.Tensor, label_N: torch.Tensor, written_N: torch.Tensor, class_names: list[str]
) -> dict[str, float]:
    """What a word on the picture does to a model.

    ``attack_success_rate``: share of pictures answered with the written class. ``acc1_without_self_attacks``: acc1 of the pictures
    that carry another name than their own (four ImageNet classes share theirs: "missile", "sunglasses"); absent without any.
    """
    self_attack_N = torch.tensor(
        [class_names[t] == class_names[w] for t, w in zip(label_N.tolist(), written_N.tolist(), strict=True)]
    )
    metrics = {
        "attack_success_rate": (best_NK[:, 0] == written_N).double().mean().item(),
        "num_self_attacks": self_attack_N.sum().item(),
    }
    others = ~self_attack_N
    if others.any():
        metrics["acc1_without_self_attacks"] = (best_NK[others, 0] == label_N[others]).double().mean().item()
    return metrics
