"""Metrics, intervals and tests, against hand-computed numbers, plain loops and exact sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raysys.errors import UserError
from raysys.evaluation import metrics as module
from raysys.evaluation.metrics import CLASSIFICATION, PRIMARY, RETRIEVAL, compare, drop, intervals, metrics


def classified(true_class: list[int], true_rank: list[int], names: list[str] | None = None, **attack: list[Any]) -> pa.Table:
    columns: dict[str, Any] = {
        "picture": names or [f"{i:06d}.png" for i in range(len(true_class))],
        "true_class": pa.array(true_class, pa.int32()),
        "true_rank": pa.array(true_rank, pa.int32()),
    }
    return pa.table(columns | {name: pa.array(values, pa.bool_() if name == "self_attack" else pa.int32()) for name, values in attack.items()})  # fmt: skip


def hits(*hit: int) -> pa.Table:
    """Pictures of one class, answered rightly (1) or not (0)."""
    return classified([0] * len(hit), [1 if h else 2 for h in hit])


def retrieved(ranks: dict[str, tuple[int, list[int]]]) -> pa.Table:
    """Picture -> (rank of its best caption, rank of the picture for each of its captions)."""
    rows: list[tuple[str, str | None, int]] = []
    for picture, (text_rank, image_ranks) in ranks.items():
        rows += [(picture, f"caption {i} of {picture}", rank) for i, rank in enumerate(image_ranks)]
        rows.append((picture, None, text_rank))
    picture, caption, rank = zip(*rows, strict=True)
    return pa.table({"picture": picture, "caption": pa.array(caption, pa.string()), "rank": pa.array(rank, pa.int32())})


# ---- metrics ----------------------------------------------------------------------------------------------------------


def test_classification_counts_first_and_fifth_answers_and_every_class_alike() -> None:
    found = metrics(CLASSIFICATION, classified([0, 0, 0, 7], [1, 5, 6, 1]))
    assert found == {
        "acc1": 2 / 4,
        "acc5": 3 / 4,
        "mean_per_class_recall": pytest.approx(
            (1 / 3 + 1) / 2
        ),  # class 0: one of three; class 7: its one; the others have no picture
        "num_pictures": 4,
        "num_classes_with_pictures": 2,
    }


def test_an_attack_is_counted_with_and_without_pictures_that_carry_their_own_name() -> None:
    table = classified(
        [0, 0, 1, 1],
        [1, 2, 3, 1],
        written_class=[1, 1, 0, 2],
        written_rank=[4, 1, 5, 2],
        self_attack=[False, False, False, True],
    )
    found = metrics(CLASSIFICATION, table)
    assert found["acc1"] == 2 / 4
    assert found["attack_success_rate"] == 1 / 4
    assert found["num_self_attacks"] == 1
    assert found["acc1_without_self_attacks"] == pytest.approx(1 / 3)
    assert found["attack_success_rate_without_self_attacks"] == pytest.approx(1 / 3)
    assert found["pair_acc"] == pytest.approx(2 / 3)  # 1 < 4 and 3 < 5, not 2 < 1


def test_a_set_of_self_attacks_only_has_no_share_without_them() -> None:
    table = classified([0, 0], [1, 2], written_class=[0, 0], written_rank=[1, 2], self_attack=[True, True])
    found = metrics(CLASSIFICATION, table)
    assert found["num_self_attacks"] == 2 and found["attack_success_rate"] == 1 / 2
    assert not [name for name in (*found, *intervals(CLASSIFICATION, table)) if "without" in name or name == "pair_acc"]


def test_retrieval_asks_captions_for_pictures_and_pictures_for_captions() -> None:
    table = retrieved({"a": (1, [1, 5, 11]), "b": (6, [2])})
    assert metrics(RETRIEVAL, table) == {
        "image_retrieval_recall@1": 1 / 4,
        "image_retrieval_recall@5": 3 / 4,
        "image_retrieval_recall@10": 3 / 4,
        "text_retrieval_recall@1": 1 / 2,
        "text_retrieval_recall@5": 1 / 2,
        "text_retrieval_recall@10": 1,
        "mean_recall@1": (1 / 4 + 1 / 2) / 2,
        "num_pictures": 2,
        "num_captions": 4,
    }


def test_counts_are_whole_numbers_and_every_evaluator_has_its_metric() -> None:
    classification = classified([0], [1], written_class=[1], written_rank=[2], self_attack=[False])
    found = metrics(CLASSIFICATION, classification) | metrics(RETRIEVAL, retrieved({"a": (1, [1])}))
    assert {name for name, value in found.items() if isinstance(value, int)} == {name for name in found if name.startswith("num_")}
    assert set(PRIMARY.values()) <= set(found)


# ---- intervals --------------------------------------------------------------------------------------------------------


def test_interval_covers_the_truth_about_95_times_of_100() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        low, high = intervals(CLASSIFICATION, hits(*rng.binomial(1, 0.3, 150)))["acc1"]
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def naive(table: pa.Table, task: str, name: str, resamples: int) -> tuple[float, float]:
    """The bootstrap as the books have it: draw pictures with all their rows, ask :func:`metrics`, take percentiles."""
    rows_of: dict[str, list[int]] = {}
    for i, picture in enumerate(table["picture"].to_pylist()):
        rows_of.setdefault(picture, []).append(i)
    rng = np.random.default_rng(1)
    names = list(rows_of)
    values = []
    for _ in range(resamples):
        rows, renamed = [], []
        for new, drawn in enumerate(rng.integers(len(names), size=len(names))):
            rows += rows_of[names[drawn]]
            renamed += [str(new)] * len(rows_of[names[drawn]])
        drawn_table = table.take(rows).set_column(0, "picture", pa.array(renamed))
        values.append(metrics(task, drawn_table)[name])
    low, high = np.percentile(values, (2.5, 97.5))
    return float(low), float(high)


@pytest.mark.parametrize("name", ["image_retrieval_recall@1", "mean_recall@1"])
def test_interval_draws_a_picture_with_all_its_captions(name: str) -> None:
    rng = np.random.default_rng(2)
    # captions of a picture are alike: drawn one by one their interval would be less than half as wide
    table = retrieved({f"p{i}": (1, [1 if rng.random() < 0.5 else 2] * int(rng.integers(3, 9))) for i in range(60)})
    assert intervals(RETRIEVAL, table)[name] == pytest.approx(naive(table, RETRIEVAL, name, 1500), abs=0.012)


def test_interval_of_mean_per_class_recall_leaves_out_the_classes_that_a_resample_misses() -> None:
    rng = np.random.default_rng(3)
    table = classified([0] * 40 + [1, 1, 2], [int(r) for r in rng.integers(1, 3, 43)])
    expected = naive(table, CLASSIFICATION, "mean_per_class_recall", 1500)
    assert intervals(CLASSIFICATION, table)["mean_per_class_recall"] == pytest.approx(expected, abs=0.02)


def test_intervals_hold_their_value_do_not_depend_on_the_order_of_rows_and_come_out_the_same_again() -> None:
    rng = np.random.default_rng(4)
    ranks = [int(r) for r in rng.integers(1, 9, 80)]
    table = classified([i % 7 for i in range(80)], ranks)
    found = intervals(CLASSIFICATION, table)
    values = metrics(CLASSIFICATION, table)
    assert set(found) == {"acc1", "acc5", "mean_per_class_recall"}
    assert all(low < values[name] < high for name, (low, high) in found.items())
    assert intervals(CLASSIFICATION, table.take(rng.permutation(80))) == found


def test_a_set_of_many_distinct_pictures_is_resampled_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    table = classified([i % 10 for i in range(100)], [1 + i % 3 for i in range(100)])
    at_once = intervals(CLASSIFICATION, table)
    monkeypatch.setattr(module, "BLOCK", 50)
    assert intervals(CLASSIFICATION, table) == at_once


# ---- two models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("only_first, only_second", [(3, 12), (20, 31), (1, 2), (7, 7)])
def test_p_is_mcnemars_exact_one_for_single_questions(only_first: int, only_second: int) -> None:
    first = hits(*[1] * only_first, *[0] * only_second, *[1] * 50, *[0] * 30)
    second = hits(*[0] * only_first, *[1] * only_second, *[1] * 50, *[0] * 30)
    n, fewer = only_first + only_second, min(only_first, only_second)
    exact = min(2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n, 1)
    found = compare(CLASSIFICATION, first, second)["acc1"]
    assert found.value == pytest.approx((only_second - only_first) / (n + 80))
    assert found.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / module.DRAWS) + 2e-5)


def test_p_of_captions_exchanges_whole_pictures() -> None:
    first = {"a": (1, [2, 2, 2]), "b": (2, [2, 1]), "c": (1, [1, 2]), "d": (2, [2, 2]), "e": (2, [1])}
    second = {"a": (1, [1, 1, 1]), "b": (1, [1, 1]), "c": (1, [1, 1]), "d": (2, [1, 2]), "e": (1, [2])}
    found = compare(RETRIEVAL, retrieved(first), retrieved(second))
    gained = [3, 1, 1, 1, -1]  # captions that the second finds and the first does not, a picture each
    assert found["image_retrieval_recall@1"].value == pytest.approx(sum(gained) / 10)
    far = [abs(sum(s * g for s, g in zip(signs, gained, strict=True))) >= 5 for signs in itertools.product((-1, 1), repeat=5)]
    assert found["image_retrieval_recall@1"].p == pytest.approx(sum(far) / 32, abs=0.006)
    both = [g / 10 / 2 + t / 5 / 2 for g, t in zip(gained, [0, 1, 0, 0, 1], strict=True)]
    far = [
        abs(sum(s * b for s, b in zip(signs, both, strict=True))) >= sum(both) - 1e-12
        for signs in itertools.product((-1, 1), repeat=5)
    ]
    assert found["mean_recall@1"].value == pytest.approx(sum(both))
    assert found["mean_recall@1"].p == pytest.approx(sum(far) / 32, abs=0.006)


def test_p_of_mean_per_class_recall_weighs_pictures_by_their_class() -> None:
    classes = [0, 0, 0, 0, 1, 1]
    first, second = classified(classes, [2, 2, 1, 2, 2, 2]), classified(classes, [1, 1, 2, 2, 1, 2])
    adds = [1 / 8, 1 / 8, -1 / 8, 1 / 4]
    far = [abs(sum(s * a for s, a in zip(signs, adds, strict=True))) >= 3 / 8 for signs in itertools.product((-1, 1), repeat=4)]
    found = compare(CLASSIFICATION, first, second)["mean_per_class_recall"]
    assert found.value == pytest.approx(3 / 8)
    assert found.p == pytest.approx(sum(far) / 16, abs=0.006)


def test_the_interval_of_a_difference_is_of_pairs() -> None:
    rng = np.random.default_rng(5)
    first = rng.binomial(1, 0.5, 400)
    second = np.where(rng.random(400) < 0.1, 1, first)  # the second knows what the first knows, and a bit more
    found = compare(CLASSIFICATION, hits(*first), hits(*second))["acc1"]
    paired_error = (second - first).std() / 20
    assert (found.low, found.high) == pytest.approx(
        (found.value - 1.96 * paired_error, found.value + 1.96 * paired_error), abs=0.004
    )
    assert found.low > 0 and found.p < 0.001


def test_a_model_does_not_differ_from_itself_and_rows_may_come_in_any_order() -> None:
    table = retrieved({f"p{i}": (1 + i % 3, [1 + i % 2, 1]) for i in range(20)})
    found = compare(RETRIEVAL, table, table.take(np.random.default_rng(6).permutation(60)))
    assert {(d.value, d.low, d.high, d.p) for d in found.values()} == {(0, 0, 0, 1)}


@pytest.mark.parametrize(
    "task, second, why",
    [
        (CLASSIFICATION, classified([0, 0], [1, 1], ["000000.png", "other.png"]), "has 000001.png"),
        (CLASSIFICATION, classified([0], [1]), "has 000001.png"),
        (CLASSIFICATION, classified([0, 1], [1, 1]), "classes or captions differ"),
        (CLASSIFICATION, classified([0, 0], [1, 1], written_class=[1, 1], written_rank=[2, 2], self_attack=[False, False]), "differ"),
    ],
)  # fmt: skip
def test_models_asked_of_different_pictures_are_not_compared(task: str, second: pa.Table, why: str) -> None:
    with pytest.raises(UserError, match=why) as error:
        compare(task, classified([0, 0], [1, 1]), second)
    assert "\n" not in str(error.value)


def test_other_captions_of_the_same_pictures_are_not_compared() -> None:
    with pytest.raises(UserError, match="captions differ"):
        compare(RETRIEVAL, retrieved({"a": (1, [1])}), retrieved({"a": (1, [1, 2])}))


# ---- clean and attacked -----------------------------------------------------------------------------------------------


def test_drop_pairs_pictures_by_name_up_to_the_suffix() -> None:
    names = [f"n/{i:02d}" for i in range(12)]
    clean = classified([0] * 12, [1] * 10 + [2, 2], [f"{name}.png" for name in names])
    order = list(reversed(range(12)))
    ranks = [2] * 6 + [1] * 4 + [1, 2]
    attacked = classified([0] * 12, [ranks[i] for i in order], [f"{names[i]}.JPEG" for i in order])
    found = drop(clean, attacked)
    assert found is not None
    assert found.value == pytest.approx((6 - 1) / 12)
    assert found.p == pytest.approx(2 * (1 + 7) / 2**7, abs=0.005)  # six lost, one won
    assert found.low < found.value < found.high


@pytest.mark.parametrize(
    "attacked",
    [
        classified([0, 0], [1, 1], ["a.JPEG", "c.JPEG"]),
        classified([0, 1], [1, 1], ["a.JPEG", "b.JPEG"]),
        classified([0], [1], ["a.JPEG"]),
        classified([0, 0], [1, 1], ["a.JPEG", "a.jpg"]),  # which of them was a.png?
    ],
)
def test_there_is_no_drop_between_sets_of_other_pictures(attacked: pa.Table) -> None:
    assert drop(classified([0, 0], [1, 1], ["a.png", "b.png"]), attacked) is None
