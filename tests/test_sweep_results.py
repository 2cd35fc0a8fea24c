"""What a sweep makes of its trials, from results written by hand: rows, points, the front, the files, the table."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import S3Server

from raysys.board import Board
from raysys.storage import list_names
from raysys.sweeping.results import (
    Estimate,
    PointResult,
    Row,
    best_point,
    estimate,
    pareto_front,
    points_of,
    row_of,
    table,
    write_hparams,
    write_tables,
)

IMAGENET, COCO = "imagenet/acc1", "coco/mean_recall@1"
OBJECTIVES = [IMAGENET, COCO]


def result(imagenet: float, coco: float, status: str = "finished", **more: Any) -> dict[str, Any]:
    """A result.json."""
    metrics = {"imagenet": {"acc5": 0.9, "acc1": imagenet}, "coco": {"mean_recall@1": coco}}
    known = {"steps": 100, "kept_share": 0.25, "metrics": metrics, "seconds": 8.5, "samples_per_s": 120.0}
    return {"status": status, "reason": None, **known, **more}


def row(point: int, seed: int, values: dict[str, Any], written: dict[str, Any] | None, objective: str = "mean") -> Row:
    return row_of(f"p{point}_s{seed}", point, seed, values, written, objectives=OBJECTIVES, objective=objective)


def point_of(number: int, *means: float, complete: bool = True) -> PointResult:
    """With these means of ``a``, ``b``, ...; their mean is the score."""
    own = {name: Estimate(mean, None, None) for name, mean in zip("abc", means, strict=False)}
    score = Estimate(sum(means) / len(means), None, None)
    return PointResult(number, {}, ["t"], int(complete), None, own, score, None)


# ---- trials -----------------------------------------------------------------------------------------------------------


def test_row_has_the_columns_in_their_order() -> None:
    own = row(3, 1, {"augment.factor": 4}, result(0.5, 0.25))
    assert own == {
        "trial": "p3_s1", "point": 3, "seed": 1, "status": "finished", "reason": None, "augment.factor": 4, "steps": 100, "kept_share": 0.25,
        "score": 0.375, IMAGENET: 0.5, COCO: 0.25, "imagenet/acc5": 0.9, "seconds": 8.5, "samples_per_s": 120.0,
    }  # fmt: skip
    assert list(own)[4:] == [
        "reason", "augment.factor", "steps", "kept_share", "score", IMAGENET, COCO, "imagenet/acc5", "seconds", "samples_per_s",
    ]  # fmt: skip


@pytest.mark.parametrize(("objective", "score"), [("mean", 0.375), ("front", 0.375), ("imagenet", 0.5), ("coco", 0.25)])
def test_score_is_the_mean_or_one_evaluators_objective(objective: str, score: float) -> None:
    assert row(0, 0, {}, result(0.5, 0.25), objective)["score"] == score


@pytest.mark.parametrize("status", ["finished", "stopped"])
@pytest.mark.parametrize(("value", "word"), [(math.nan, "nan"), (math.inf, "inf"), (None, "missing")])
def test_objective_without_a_finite_number_fails_the_trial(status: str, value: float, word: str) -> None:
    own = row(0, 0, {}, result(value, 0.25, status))
    assert (own["status"], own["reason"], own["score"]) == ("failed", f"imagenet/acc1 is {word}", None)
    assert own[COCO] == 0.25 and own["steps"] == 100 and own["kept_share"] == 0.25


def test_every_objective_without_a_number_is_named() -> None:
    own = row(0, 0, {}, result(math.nan, 0.1) | {"metrics": {"imagenet": {"acc1": math.nan}}})
    assert own["reason"] == "imagenet/acc1 is nan, coco/mean_recall@1 is missing"


def test_another_metric_without_a_number_does_not_fail_the_trial() -> None:
    written = result(0.5, 0.25)
    written["metrics"]["imagenet"]["acc5"] = math.nan
    assert row(0, 0, {}, written)["status"] == "finished"


def test_failed_trial_keeps_its_own_reason() -> None:
    own = row(0, 0, {}, {"status": "failed", "reason": "policy keeps 3 samples"})
    assert (own["status"], own["reason"], own["score"], own["steps"], own[IMAGENET]) == (
        "failed", "policy keeps 3 samples", None, None, None,
    )  # fmt: skip


def test_trial_without_a_result_is_missing() -> None:
    own = row(0, 0, {}, None)
    assert (own["status"], own["reason"]) == ("missing", "not run to its end; the same words go on")


# ---- points -----------------------------------------------------------------------------------------------------------


def test_interval_of_three_seeds_is_students() -> None:
    """Mean 0.5, s = 0.1, t(.975, 2) = 4.30265 by the tables: half = 4.30265 x 0.1 / sqrt(3) = 0.248414."""
    own = estimate([0.4, 0.5, 0.6])
    assert (
        own.mean == pytest.approx(0.5)
        and own.low == pytest.approx(0.251586, abs=1e-6)
        and own.high == pytest.approx(0.748414, abs=1e-6)
    )


def test_interval_of_two_seeds_is_wide() -> None:
    """t(.975, 1) = 12.7062, s / sqrt(2) = half of the distance = 0.01."""
    own = estimate([0.5, 0.52])
    assert own.low == pytest.approx(0.51 - 0.127062, abs=1e-6) and own.high == pytest.approx(0.51 + 0.127062, abs=1e-6)


def test_one_seed_has_no_interval() -> None:
    assert estimate([0.5]) == Estimate(0.5, None, None)


def test_point_is_the_mean_of_its_finished_trials_only() -> None:
    rows = [
        row(1, 0, {"k": 2}, result(0.9, 0.9)),
        row(0, 0, {"k": 1}, result(0.4, 0.1)),
        row(0, 1, {"k": 1}, result(0.6, 0.3, kept_share=0.75)),
        row(0, 2, {"k": 1}, result(0.99, 0.99, "stopped", steps=10, reason="asha")),
        row(0, 3, {"k": 1}, {"status": "crashed", "reason": "out of memory"}),
    ]
    first, second = points_of(rows, ["k"], OBJECTIVES)
    assert (first.number, first.values, first.trials) == (0, {"k": 1}, ["p0_s0", "p0_s1", "p0_s2", "p0_s3"])
    assert (first.num_finished, first.complete, first.reason) == (2, False, "asha")
    assert first.objectives[IMAGENET].mean == pytest.approx(0.5) and first.objectives[COCO].mean == pytest.approx(0.2)
    assert first.score is not None and first.score.mean == pytest.approx(0.35)
    assert first.kept_share is not None and first.kept_share.mean == 0.5
    assert second.complete and second.reason is None and second.objectives[IMAGENET] == Estimate(0.9, None, None)


def test_point_of_which_no_trial_finished_has_no_numbers() -> None:
    (own,) = points_of([row(0, 0, {}, None), row(0, 1, {}, result(0.5, 0.5, "stopped"))], [], OBJECTIVES)
    assert (own.num_finished, own.objectives, own.score, own.kept_share) == (0, {}, None, None)
    assert own.reason == "not run to its end; the same words go on"


def test_front_is_what_no_complete_point_beats() -> None:
    points = [
        point_of(0, 0.5, 0.5),  # beaten by 1: equal in one, better in the other
        point_of(1, 0.5, 0.6),
        point_of(2, 0.9, 0.1),
        point_of(3, 0.5, 0.6),  # equal to 1: neither beats the other
        point_of(4, 0.4, 0.5),
        point_of(5, 0.99, 0.99, complete=False),  # beats all, but a seed of it is not done
    ]
    assert pareto_front(points) == [1, 2, 3]


def test_front_of_one_objective_is_its_largest() -> None:
    assert pareto_front([point_of(0, 0.1), point_of(1, 0.3), point_of(2, 0.2)]) == [1]


def test_best_is_the_largest_mean_score_and_of_equals_the_first() -> None:
    best = best_point([point_of(3, 0.2, 0.6), point_of(1, 0.6, 0.2), point_of(0, 0.1, 0.1), point_of(2, 0.9, 0.9, complete=False)])
    assert best is not None and best.number == 1


def test_nothing_is_best_where_no_point_is_complete() -> None:
    assert best_point([point_of(0, 0.5, complete=False)]) is None and pareto_front([point_of(0, 0.5, complete=False)]) == []


# ---- files ------------------------------------------------------------------------------------------------------------


def tables(folder: Path, rows: list[Row], keys: list[str]) -> tuple[pa.Table, list[dict[str, Any]]]:
    write_tables(str(folder), rows, points_of(rows, keys, OBJECTIVES), OBJECTIVES)
    return pq.read_table(folder / "results.parquet"), json.loads((folder / "front.json").read_text())


def test_parquet_has_a_typed_row_a_trial(tmp_path: Path) -> None:
    swept = [
        {"policy": "paper", "augment.factor": 1, "optim.lr": 0.5, "mixed": 1, "on": True, "area": None},
        {"policy": "none", "augment.factor": 4, "optim.lr": 1, "mixed": [1, "x"], "on": False, "area": 0.5},
    ]
    rows = [row(0, 0, swept[0], {"status": "failed", "reason": "diverged"}), row(1, 7, swept[1], result(0.5, 0.25))]
    found, _ = tables(tmp_path, rows, list(swept[0]))
    assert [(field.name, str(field.type)) for field in found.schema] == [
        ("trial", "string"), ("point", "int64"), ("seed", "int64"), ("status", "string"), ("reason", "string"),
        ("policy", "string"), ("augment.factor", "int64"), ("optim.lr", "double"), ("mixed", "string"), ("on", "bool"), ("area", "double"),
        ("steps", "int64"), ("kept_share", "double"), ("score", "double"), (IMAGENET, "double"), (COCO, "double"), ("imagenet/acc5", "double"),
        ("seconds", "double"), ("samples_per_s", "double"),
    ]  # fmt: skip
    failed, finished = found.to_pylist()
    assert failed == {name: None for name in finished} | {
        "trial": "p0_s0", "point": 0, "seed": 0, "status": "failed", "reason": "diverged", **swept[0], "mixed": "1",
    }  # fmt: skip
    assert finished["mixed"] == '[1, "x"]' and finished["seed"] == 7 and finished[COCO] == 0.25 and finished["steps"] == 100


def test_columns_have_their_types_where_all_is_null(tmp_path: Path) -> None:
    found, front = tables(tmp_path, [row(0, 0, {"k": None}, None)], ["k"])
    types = {field.name: str(field.type) for field in found.schema}
    assert (types["steps"], types["score"], types[IMAGENET], types["seconds"], types["k"]) == (
        "int64",
        "double",
        "double",
        "double",
        "string",
    )
    assert front == []


def test_front_file_has_its_points_best_first(tmp_path: Path) -> None:
    rows = [
        row(0, 0, {"k": [1]}, result(0.9, 0.1)),
        row(1, 0, {"k": None}, result(0.4, 0.8)),
        row(1, 1, {"k": None}, result(0.6, 0.8)),
        row(2, 0, {"k": 3}, result(0.1, 0.1)),
        row(3, 0, {"k": 4}, None),
    ]
    _, front = tables(tmp_path, rows, ["k"])
    assert [entry["point"] for entry in front] == [1, 0]
    assert front[1] == {
        "point": 0, "values": {"k": [1]}, "trials": ["p0_s0"], "kept_share": {"mean": 0.25, "low": None, "high": None},
        "objectives": {IMAGENET: {"mean": 0.9, "low": None, "high": None}, COCO: {"mean": 0.1, "low": None, "high": None}},
        "score": {"mean": 0.5, "low": None, "high": None},
    }  # fmt: skip
    assert front[0]["trials"] == ["p1_s0", "p1_s1"] and front[0]["objectives"][IMAGENET]["low"] == pytest.approx(
        0.5 - 1.27062, abs=1e-5
    )


# ---- TensorBoard ------------------------------------------------------------------------------------------------------

SWEPT = ["lr", "area", "on", "k"]
MIXED = [
    row(0, 0, {"lr": 0.1, "area": None, "on": True, "k": [1]}, result(0.5, 0.25)),
    row(1, 1, {"lr": 1, "area": 0.5, "on": False, "k": "x"}, result(0.75, 0.5, "stopped", steps=40)),
    row(2, 0, {"lr": 2, "area": 0.5, "on": False, "k": "x"}, None),
]


def events(folder: Path) -> list[Any]:
    """Summary values of the only event file there, with their steps."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    (path,) = folder.iterdir()
    return [(value, event.step) for event in LegacyEventFileLoader(str(path)).Load() for value in event.summary.value]


def tagged(numbers: dict[str, float]) -> dict[str, float]:
    """By the tags that training and evaluation have for them."""
    places = {"kept_share": "data/", "steps": "train/"}
    return {places.get(name, "val/") + name: value for name, value in numbers.items()}


def test_hparams_stand_once_in_the_event_files_of_trials_with_numbers(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    for _ in range(2):
        write_hparams(str(tmp_path), MIXED, SWEPT, OBJECTIVES)
    assert sorted(path.name for path in (tmp_path / "tensorboard").iterdir()) == ["p0_s0", "p1_s1"]
    expected = [
        ({"lr": 0.1, "seed": 0.0, "area": "null", "on": "true", "k": "[1]"}, {IMAGENET: 0.5, COCO: 0.25, "score": 0.375}, 100),
        ({"lr": 1.0, "seed": 1.0, "area": "0.5", "on": "false", "k": "x"}, {IMAGENET: 0.75, COCO: 0.5, "score": 0.625}, 40),
    ]
    for trial, (hyper, numbers, steps) in zip(("p0_s0", "p1_s1"), expected, strict=True):
        found = events(tmp_path / "tensorboard" / trial)
        (start,) = [value for value, _ in found if value.tag == metadata.SESSION_START_INFO_TAG]
        stored = metadata.parse_session_start_info_plugin_data(start.metadata.plugin_data.content).hparams
        assert {name: getattr(value, value.WhichOneof("kind")) for name, value in stored.items()} == hyper
        scalars = [(value.tag, value.simple_value, step) for value, step in found if value.HasField("simple_value")]
        numbers = tagged(numbers | {"kept_share": 0.25, "steps": steps})
        assert sorted(scalars) == sorted((name, value, steps) for name, value in numbers.items())
        (experiment,) = [value for value, _ in found if value.tag == metadata.EXPERIMENT_TAG]
        declared = metadata.parse_experiment_plugin_data(experiment.metadata.plugin_data.content)
        assert {info.name.tag for info in declared.metric_infos} == numbers.keys()


def test_an_earlier_board_stays_until_the_new_one_is_there_and_trials_that_are_gone_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_hparams(str(tmp_path), MIXED, SWEPT, OBJECTIVES)
    trials = {"p0_s0", "p1_s1"}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(Board, "hparams", full)
        write_hparams(str(tmp_path), MIXED, SWEPT, OBJECTIVES)
    assert {trial.name for trial in (tmp_path / "tensorboard").iterdir() if events(trial)} == trials
    write_hparams(str(tmp_path), MIXED[:1], SWEPT, OBJECTIVES)
    assert list_names(str(tmp_path / "tensorboard")) == ["p0_s0"]


def test_every_trial_declares_the_same_types(tmp_path: Path) -> None:
    from tensorboard.plugins.hparams import metadata

    write_hparams(str(tmp_path), MIXED, SWEPT, OBJECTIVES)
    contents = [
        value.metadata.plugin_data.content
        for trial in ("p0_s0", "p1_s1")
        for value, _ in events(tmp_path / "tensorboard" / trial)
        if value.tag == metadata.EXPERIMENT_TAG
    ]
    first, second = ({i.name: i.type for i in metadata.parse_experiment_plugin_data(content).hparam_infos} for content in contents)
    assert first == second and first["area"] == first["on"] == first["k"] != first["lr"] == first["seed"]


def test_tensorboard_itself_lists_the_trials_with_their_metrics(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

    write_hparams(str(tmp_path), MIXED, ["lr", "area"], OBJECTIVES)
    multiplexer = plugin_event_multiplexer.EventMultiplexer()
    multiplexer.AddRunsFromDirectory(str(tmp_path)).Reload()
    backend = backend_context.Context(
        base_plugin.TBContext(data_provider=data_provider.MultiplexerDataProvider(multiplexer, str(tmp_path)))
    )
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=[api_pb2.STATUS_SUCCESS], include_metrics=True
    )
    request = RequestContext()
    experiment = backend.experiment_from_metadata(request, "", True, backend.hparams_metadata(request, ""), None)
    assert {info.name for info in experiment.hparam_infos} == {"lr", "area", "seed"}
    groups = list_session_groups.Handler(request, backend, "", asked).run().session_groups
    shown = {group.sessions[0].name: {metric.name.tag: metric.value for metric in group.metric_values} for group in groups}
    assert shown == {
        "tensorboard/p0_s0": tagged({IMAGENET: 0.5, COCO: 0.25, "kept_share": 0.25, "score": 0.375, "steps": 100}),
        "tensorboard/p1_s1": tagged({IMAGENET: 0.75, COCO: 0.5, "kept_share": 0.25, "score": 0.625, "steps": 40}),
    }


def test_files_are_written_to_an_object_store(s3: S3Server) -> None:
    bucket = s3.new_bucket()
    for _ in range(2):
        write_hparams(f"{bucket}/W", MIXED, SWEPT, OBJECTIVES)
    write_tables(f"{bucket}/W", MIXED, points_of(MIXED, SWEPT, OBJECTIVES), OBJECTIVES)
    assert sorted(list_names(f"{bucket}/W")) == ["front.json", "results.parquet", "tensorboard"]
    assert sorted(list_names(f"{bucket}/W/tensorboard")) == ["p0_s0", "p1_s1"]
    assert len(list_names(f"{bucket}/W/tensorboard/p0_s0")) == 1


# ---- the table --------------------------------------------------------------------------------------------------------


def table_of(rows: list[Row], keys: list[str]) -> list[str]:
    points = points_of(rows, keys, OBJECTIVES)
    best = best_point(points)
    return table(rows, points, keys, OBJECTIVES, None if best is None else best.number)


def test_table_reads_as_it_should() -> None:
    values = [
        {"policy": "paper", "lr": 0.001, "factor": 1},
        {"policy": "none", "lr": 0.01, "factor": 1},
        {"policy": "none", "lr": 0.1, "factor": 1},
    ]
    rows = [
        row(0, 0, values[0], result(0.50, 0.25)),
        row(0, 1, values[0], result(0.52, 0.25)),
        row(1, 0, values[1], result(0.60, 0.30, kept_share=1.0)),
        row(1, 1, values[1], result(0.70, 0.30, kept_share=1.0)),
        row(2, 0, values[2], result(0.90, 0.90)),
        row(2, 1, values[2], {"status": "failed", "reason": "loss is nan\nat line 3", "steps": 12}),
    ]
    assert table_of(rows, ["policy", "lr", "factor"]) == [
        "   point  policy  lr     seeds    kept  imagenet/acc1            coco/mean_recall@1       score",
        "*      1  none    0.010      2  100.0%  0.6500 [0.0147, 1.2853]  0.3000 [0.3000, 0.3000]  0.4750 [0.1573, 0.7927]",
        "       0  paper   0.001      2   25.0%  0.5100 [0.3829, 0.6371]  0.2500 [0.2500, 0.2500]  0.3800 [0.3165, 0.4435]",
        "       2  none    0.100    1/2   25.0%  0.9000                   0.9000                   0.9000                 "
        "  p2_s1: failed after 12 steps: loss is nan",
        "every point: factor=1",
        "numbers are means over a point's finished seeds, [ ] their 95 % interval (Student's t); one seed alone has none",
        "a point of which not every seed finished stands last, and is neither on the front nor best",
        "* is the Pareto front of the means: no other complete point is as good in every objective and better in one; best by score: point 1",
    ]  # fmt: skip


def test_stopped_trial_is_told_with_its_steps_and_is_in_no_mean() -> None:
    rows = [row(0, 0, {"k": 1}, result(0.5, 0.25, "stopped", steps=40)), row(1, 0, {"k": 2}, result(0.1, 0.1))]
    lines = table_of(rows, ["k"])
    assert lines[1].split()[:5] == ["*", "1", "2", "1", "25.0%"]
    assert lines[2] == "       0  1    0/1  p0_s0: stopped after 40 steps with score 0.3750"
    assert "a stopped trial is in no mean: its numbers are of fewer steps" in lines


def test_points_that_failed_come_before_those_that_were_stopped() -> None:
    rows = [
        row(0, 0, {"k": 1}, result(0.5, 0.25, "stopped")),
        row(1, 0, {"k": 2}, None),
        row(2, 0, {"k": 3}, {"status": "crashed", "reason": "x" * 300}),
    ]
    lines = table_of(rows, ["k"])
    assert [line.split()[0] for line in lines[1:4]] == ["1", "2", "0"]
    assert lines[1].endswith("0/1  p1_s0: missing: not run to its end; the same words go on")
    assert lines[2].endswith("p2_s0: crashed: " + "x" * 99 + "…")
    assert lines[-1].endswith("no point is complete, so none is best")


def test_points_with_the_same_numbers_in_every_seed_are_told_as_one_training() -> None:
    scores = {0: (0.5, 0.6), 1: (0.5, 0.6), 2: (0.5, 0.7)}
    rows = [
        row(point, seed, {"augment.factor": point}, result(own, 0.25))
        for point, seeds in scores.items()
        for seed, own in enumerate(seeds)
    ]
    lines = table(rows, points_of(rows, ["augment.factor"], OBJECTIVES), ["augment.factor"], OBJECTIVES, 2)
    assert next(line for line in lines if "same training" in line).startswith("points 0, 1 have the same numbers")
    rows[2] = row(1, 0, {"augment.factor": 1}, result(0.5001, 0.25))
    lines = table(rows, points_of(rows, ["augment.factor"], OBJECTIVES), ["augment.factor"], OBJECTIVES, 2)
    assert not [line for line in lines if "same training" in line]


def test_long_table_shows_the_front_and_the_best_forty() -> None:
    """Point 0 has the lowest score and stands on the front by its coco."""
    rows = [row(n, 0, {"k": n}, result(0.01 * n, 0.1 if n else 0.15)) for n in range(60)]
    rows += [row(n, 0, {"k": n}, None) for n in range(60, 105)]
    lines = table_of(rows, ["k"])
    numbers = [int(line.removeprefix("*").split()[0]) for line in lines[1:82]]
    assert numbers == [*range(59, 19, -1), 0, *range(60, 100)]
    assert lines[82] == "24 more points are not shown; results.parquet has all"
    assert [n for n, line in zip(numbers, lines[1:], strict=False) if line.startswith("*")] == [59, 0]


@pytest.mark.parametrize(
    ("values", "cells"),
    [
        ([0.5, 0.25, 1], ["0.50", "0.25", "1.00"]),
        ([0.00003, 0.001, 0.0123456], ["3.00e-05", "1.00e-03", "1.23e-02"]),
        ([1, 250000, 3], ["1", "250000", "3"]),
        ([None, 0.5, 0.125], ["null", "0.500", "0.125"]),
        ([True, False, "x"], ["true", "false", "x"]),
    ],
)
def test_values_of_a_column_are_written_alike(values: list[Any], cells: list[str]) -> None:
    rows = [row(n, 0, {"k": value}, result(0.5 - 0.1 * n, 0.25)) for n, value in enumerate(values)]
    assert [line.removeprefix("*").split()[1] for line in table_of(rows, ["k"])[1:4]] == cells
