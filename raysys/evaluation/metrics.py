"""From predictions to numbers: metrics, how sure they are, and whether two models differ. Numpy and Arrow only.

In: tables of predictions, one row a picture (classification) or a query (retrieval). Out: metrics as fractions, intervals, differences.
Every metric is a mean of shares ``sum(hits) / sum(asked)`` of columns with one row a picture, so that its value, its interval and its test
cannot disagree. Leaves asking the models to :mod:`raysys.evaluation.evaluator`, files and tables on screen to
:mod:`raysys.evaluation.results`.
Shapes: P pictures, M tables (models), K distinct rows, R resamples, S groups, G columns.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys.errors import UserError

CLASSIFICATION, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"
"""CLIP_benchmark's names of the tasks."""
PRIMARY = {
    "imagenet": "acc1",
    "imagenet_attr": "acc1",
    "typographic": "acc1",
    "coco": "mean_recall@1",
    "retrieval": "mean_recall@1",
}
"""Evaluator -> the metric that stands for it in a sweep's score and in the demo's table."""
RESAMPLES = 2_000  # percentiles need a thousand and more: Efron & Tibshirani 1993, sec. 19.3
DRAWS = 100_000  # of the test: p is known to 0.0014 at 0.05 (two standard errors), and never below 1e-5
SEED = 0
BLOCK = 2_000_000  # weights at a time, 16 MB


@dataclass(frozen=True)
class Difference:
    value: float
    """Second less first, as a fraction."""
    low: float
    high: float
    """95 % of a paired bootstrap over pictures."""
    p: float
    """Two-sided; of this metric alone, not corrected for how many are looked at."""


@dataclass(frozen=True)
class _Share:
    """A metric: the mean, over groups and columns in which something was asked, of sum(hits) / sum(asked)."""

    hits_PG: np.ndarray
    asked_PG: np.ndarray
    group_P: np.ndarray

    @classmethod
    def of(cls, *columns: tuple[np.ndarray, np.ndarray], group_P: np.ndarray | None = None) -> _Share:
        """:param columns: (hits, asked) for each picture."""
        hits_PG, asked_PG = (np.stack(side, axis=1).astype(float) for side in zip(*columns, strict=True))
        return cls(hits_PG, asked_PG, np.zeros(len(hits_PG)) if group_P is None else group_P)


# ---- metrics ----------------------------------------------------------------------------------------------------------


def metrics(task: str, predictions: pa.Table) -> dict[str, float]:
    """Shares as fractions, and counts (``num_...``, whole numbers).

    Classification (CLIP_benchmark's): ``acc1``, ``acc5`` (of as many classes as there are, where those are fewer: never NaN),
    ``mean_per_class_recall`` over the classes with pictures. Where something is written on the pictures: ``attack_success_rate``, the share
    answered with the written class; ``pair_acc``, the share whose true class scores above the written one (SCAM's question,
    arXiv:2504.04893), of pictures that carry another name than their own; ``acc1`` and ``attack_success_rate`` ``_without_self_attacks``
    of the same pictures (four ImageNet classes share a name: "missile", "sunglasses"). The last three are absent without such pictures.

    Retrieval (CLIP_benchmark's): ``image_retrieval_recall@k`` over captions, ``text_retrieval_recall@k`` over pictures (is one of its
    captions among the first k), k = 1, 5, 10; ``mean_recall@1`` is the mean of the two.
    """
    values: dict[str, float] = {name: _value(share) for name, share in _shares(task, predictions).items()}
    if task == RETRIEVAL:
        num_captions = predictions.num_rows - predictions["caption"].null_count
        return values | {"num_pictures": predictions.num_rows - num_captions, "num_captions": num_captions}
    if "self_attack" in predictions.column_names:
        values["num_self_attacks"] = int(_numpy(predictions, "self_attack").sum())
    num_classes = len(predictions["true_class"].unique())
    return values | {"num_pictures": predictions.num_rows, "num_classes_with_pictures": num_classes}


def intervals(task: str, predictions: pa.Table) -> dict[str, tuple[float, float]]:
    """Low and high of every share: 95 % percentile bootstrap over pictures (Efron & Tibshirani 1993, ch. 13).

    Pictures are drawn, each with all its captions (a cluster bootstrap); candidates stay as they are: all classes, and for retrieval the
    whole gallery, so this is how sure the number is for more pictures like these, not for a larger gallery. A class that a resample misses
    is left out of its mean_per_class_recall. A share of exactly 0 or 1 gets an interval without width; there, n pictures exclude no more
    than 3 / n.
    """
    found = {}
    for name, share in _shares(task, predictions).items():
        resampled_R = _resample(share)[:, 0]
        low, high = np.nanpercentile(resampled_R, (2.5, 97.5))
        found[name] = float(low), float(high)
    return found


def compare(task: str, first: pa.Table, second: pa.Table) -> dict[str, Difference]:
    """Every share of a second model less that of a first one, asked of the same pictures.

    The interval draws pictures, the same for both models. The test exchanges the two models' answers to a picture at random (randomisation
    test of pairs: Fisher 1935, The Design of Experiments, sec. 21; Pitman 1937); for one question a picture that is McNemar's test (1947) in
    its exact form.

    :raises UserError: where the tables are not of the same pictures, classes and captions.
    """
    _check_same(first, second)
    others = _shares(task, second)
    return {name: _difference(share, others[name]) for name, share in _shares(task, first).items()}


def drop(clean: pa.Table, attacked: pa.Table) -> Difference | None:
    """Clean acc1 less attacked acc1, picture by picture; None where the two sets are not the same pictures.

    They are where names, up to the suffix (the attack writes .JPEG), and true classes agree.
    """
    tables = []
    for table in (attacked, clean):
        stems = [os.path.splitext(name)[0] for name in table["picture"].to_pylist()]
        if len(set(stems)) < len(stems):
            return None
        tables.append(pa.table({"picture": stems, "true_class": table["true_class"], "true_rank": table["true_rank"]}))
    if not _questions(tables[0]).equals(_questions(tables[1])):
        return None
    first, second = (_shares(CLASSIFICATION, table)["acc1"] for table in tables)
    return _difference(first, second)


def _shares(task: str, predictions: pa.Table) -> dict[str, _Share]:
    """Every share that has something asked, with its pictures in the order of their names."""
    shares = _retrieval(predictions) if task == RETRIEVAL else _classification(predictions.sort_by("picture"))
    return {name: share for name, share in shares.items() if share.asked_PG.any()}


def _classification(predictions: pa.Table) -> dict[str, _Share]:
    true_class_P, true_rank_P = _numpy(predictions, "true_class"), _numpy(predictions, "true_rank")
    first_P = true_rank_P == 1
    every_P = np.ones(len(first_P))
    shares = {
        "acc1": _Share.of((first_P, every_P)),
        "acc5": _Share.of((true_rank_P <= 5, every_P)),
        "mean_per_class_recall": _Share.of((first_P, every_P), group_P=true_class_P),
    }
    if "written_class" in predictions.column_names:
        written_rank_P, other_P = _numpy(predictions, "written_rank"), ~_numpy(predictions, "self_attack")
        success_P = written_rank_P == 1
        shares |= {
            "attack_success_rate": _Share.of((success_P, every_P)),
            "pair_acc": _Share.of(((true_rank_P < written_rank_P) & other_P, other_P)),
            "acc1_without_self_attacks": _Share.of((first_P & other_P, other_P)),
            "attack_success_rate_without_self_attacks": _Share.of((success_P & other_P, other_P)),
        }
    return shares


def _retrieval(predictions: pa.Table) -> dict[str, _Share]:
    names, picture_Q = np.unique(_numpy(predictions, "picture"), return_inverse=True)
    rank_Q = _numpy(predictions, "rank")
    of_picture_Q = pc.is_null(predictions["caption"]).to_numpy()
    columns = {}
    for what, asked_Q in (("image", ~of_picture_Q), ("text", of_picture_Q)):
        asked_P = np.bincount(picture_Q, asked_Q, len(names))
        for k in (1, 5, 10):
            columns[f"{what}_retrieval_recall@{k}"] = np.bincount(picture_Q, asked_Q & (rank_Q <= k), len(names)), asked_P
    shares = {name: _Share.of(column) for name, column in columns.items()}
    return shares | {"mean_recall@1": _Share.of(columns["image_retrieval_recall@1"], columns["text_retrieval_recall@1"])}


def _numpy(table: pa.Table, column: str) -> np.ndarray:
    return table[column].combine_chunks().to_numpy(zero_copy_only=False)


# ---- two tables of the same questions ---------------------------------------------------------------------------------


def _questions(predictions: pa.Table) -> pa.Table:
    """What was asked, in one order."""
    columns = [c for c in ("picture", "true_class", "written_class", "caption") if c in predictions.column_names]
    return predictions.select(columns).sort_by([(c, "ascending") for c in columns]).combine_chunks()


def _check_same(first: pa.Table, second: pa.Table) -> None:
    if _questions(first).equals(_questions(second)):
        return
    only = set(first["picture"].to_pylist()) ^ set(second["picture"].to_pylist())
    one, other = (set(zip(*_questions(table).to_pydict().values(), strict=True)) for table in (first, second))
    differing = min(one ^ other, key=str, default=("a caption that is there twice",))[0]
    why = f"only one of them has {min(only)}" if only else f"their classes or captions differ, first at {differing}"
    raise UserError(f"two models can be compared on the same pictures only: {why}; evaluate both on one set")


def _difference(first: _Share, second: _Share) -> Difference:
    resampled_RM = _resample(first, second)
    low, high = np.nanpercentile(resampled_RM[:, 1] - resampled_RM[:, 0], (2.5, 97.5))
    value = _value(second) - _value(first)
    return Difference(value, float(low), float(high), _p_value(first, second))


# ---- statistics -------------------------------------------------------------------------------------------------------


def _value(share: _Share) -> float:
    rows_KC, starts_S, count_K = _distinct(share)
    return float(_values(rows_KC, starts_S, count_K[None], 1)[0, 0])


def _distinct(*shares: _Share) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Equal pictures as one row: [K, G + M * G] of asked and each model's hits, sorted by group; where groups start; how many each stands for."""
    columns_PC = np.column_stack([shares[0].group_P, shares[0].asked_PG, *(share.hits_PG for share in shares)])
    columns_PC = columns_PC[np.lexsort(columns_PC.T[::-1])]
    is_new_P = np.r_[True, (columns_PC[1:] != columns_PC[:-1]).any(axis=1)]
    rows_KC = columns_PC[is_new_P]
    count_K = np.diff(np.r_[np.flatnonzero(is_new_P), len(columns_PC)])
    starts_S = np.unique(rows_KC[:, 0], return_index=True)[1]
    return rows_KC[:, 1:], starts_S, count_K


def _values(rows_KC: np.ndarray, starts_S: np.ndarray, weight_RK: np.ndarray, num_shares: int) -> np.ndarray:
    """The shares [R, M] where each row counts as often as its weight; NaN where nothing is asked."""
    sums_CRS = np.stack([np.add.reduceat(weight_RK * column_K, starts_S, axis=1) for column_K in rows_KC.T])
    asked_GRS, *hits_MGRS = np.split(sums_CRS, 1 + num_shares)
    asked = asked_GRS > 0
    with np.errstate(invalid="ignore"):
        means = [
            np.divide(hits, asked_GRS, where=asked, out=np.zeros_like(hits)).sum((0, 2)) / asked.sum((0, 2)) for hits in hits_MGRS
        ]
    return np.stack(means, axis=1)


def _resample(*shares: _Share) -> np.ndarray:
    """The shares [R, M] of pictures drawn with replacement, the same for all.

    How often each distinct row is drawn is multinomial, as if every picture were drawn by itself, for the work of the few rows.
    """
    rows_KC, starts_S, count_K = _distinct(*shares)
    rng = np.random.default_rng(SEED)
    num_pictures, block = int(count_K.sum()), max(BLOCK // len(count_K), 1)
    return np.concatenate([
        _values(rows_KC, starts_S, rng.multinomial(num_pictures, count_K / num_pictures, min(block, RESAMPLES - done)), len(shares))
        for done in range(0, RESAMPLES, block)
    ])  # fmt: skip


def _p_value(first: _Share, second: _Share) -> float:
    """Share of DRAWS at least as far from 0 as what was seen, when a coin decides for each picture which model gave which answer.

    A picture adds to the difference hits / sum(asked) of its group, but for a factor that all pictures have in common, and the coin is the
    sign. Pictures that add the same share one binomial draw. What was seen counts as a draw, so p is never 0 (Phipson & Smyth 2010,
    arXiv:1603.05766).
    """
    group_P = np.unique(first.group_P, return_inverse=True)[1]
    asked_GS = np.stack([np.bincount(group_P, asked_P) for asked_P in first.asked_PG.T])
    adds_P = ((second.hits_PG - first.hits_PG) / asked_GS[:, group_P].T).sum(axis=1)
    size_J, count_J = np.unique(np.abs(adds_P[adds_P != 0]), return_counts=True)
    rng = np.random.default_rng(SEED)
    sums = np.zeros(DRAWS)
    for size, count in zip(size_J, count_J, strict=True):
        sums += size * (2 * rng.binomial(count, 0.5, DRAWS) - count)
    rounding = 1e-12 * np.abs(adds_P).sum()
    as_far = np.abs(sums) >= abs(adds_P.sum()) - rounding
    return float((1 + as_far.sum()) / (1 + DRAWS))
