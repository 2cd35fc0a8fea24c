"""What evaluate writes and prints, from predictions made by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pyarrow as pa
import pytest

from raysys.config import ModelConfig, ServiceConfig
from raysys.evaluation.evaluator import SetResult
from raysys.evaluation.metrics import CLASSIFICATION, metrics
from raysys.evaluation.results import lines, read_results, write_comparison, write_result
from raysys.output import Output, open_output

TRUE = [0, 1, 2, 0, 1, 2]


def predictions(said: list[int], written: list[int] | None = None, suffix: str = "jpg") -> pa.Table:
    """Of pictures 0.jpg ... with three classes; what is not said first stands second."""
    columns = {
        "picture": [f"{i}.{suffix}" for i in range(len(TRUE))],
        "true_class": pa.array(TRUE, pa.int32()),
        "predicted_class": pa.array(said, pa.int32()),
        "score": pa.array([0.5] * len(TRUE), pa.float32()),
        "true_rank": pa.array([1 if s == t else 2 for s, t in zip(said, TRUE, strict=True)], pa.int32()),
        "true_score": pa.array([0.4] * len(TRUE), pa.float32()),
    }
    if written is not None:
        columns["written_class"] = pa.array(written, pa.int32())
        columns["written_rank"] = pa.array([1 if s == w else 3 for s, w in zip(said, written, strict=True)], pa.int32())
        columns["self_attack"] = pa.array([False] * len(TRUE))
    return pa.table(columns)


def result(evaluator: str, table: pa.Table, notes: list[str] | None = None) -> SetResult:
    counted = metrics(CLASSIFICATION, table) | {"num_classes": 3}
    return SetResult(evaluator, evaluator, CLASSIFICATION, counted, table, notes or [])


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return open_output(str(tmp_path / "E"), "evaluate", {})


def write(output: Output, name: str, *results: SetResult) -> None:
    for one in results:
        write_result(output, name, ModelConfig("some/model.json", "random"), ServiceConfig(), one, "mark")


def test_result_is_clip_benchmarks_shape_with_more(output: Output) -> None:
    write(output, "m", result("imagenet", predictions([0, 1, 2, 0, 0, 0]), ["pictures of 3 of 4 classes"]))
    content = json.loads(Path(output.join("results", "imagenet_m.json")).read_text())
    assert {k: content[k] for k in ("dataset", "model", "pretrained", "task", "language")} == {
        "dataset": "imagenet", "model": "some/model.json", "pretrained": "random", "task": "zeroshot_classification", "language": "en",
    }  # fmt: skip
    assert content["metrics"]["acc1"] == pytest.approx(4 / 6) and content["notes"] == ["pictures of 3 of 4 classes"]
    assert [path.name for path in Path(output.join("results")).iterdir()] == ["imagenet_m.json"]
    assert "NaN" not in Path(output.join("results", "imagenet_m.json")).read_text()


def test_drop_is_told_of_the_same_pictures_under_attack(output: Output) -> None:
    clean = result("imagenet", predictions([0, 1, 2, 0, 1, 2], suffix="png"))
    write(output, "m", clean, result("imagenet_attr", predictions([1, 1, 0, 0, 1, 0], [1, 2, 0, 1, 0, 0], suffix="JPEG")))
    drop = json.loads(Path(output.join("results", "imagenet_attr_m.json")).read_text())["drop"]
    assert drop["value"] == pytest.approx(3 / 6) and drop["low"] <= drop["value"] <= drop["high"]
    told = "\n".join(lines(read_results(output, ["imagenet", "imagenet_attr"], ["m"]), []))
    assert re.search(r"acc1_drop \(clean - attacked\) +0\.5000 \[", told) and "attack_success_rate" in told


def test_every_further_model_is_compared_with_the_first(output: Output) -> None:
    for name, said in (("a", [0, 1, 2, 0, 0, 0]), ("b", [0, 1, 2, 0, 1, 2]), ("c", [0, 1, 2, 0, 0, 0])):
        write(output, name, result("imagenet", predictions(said)))
    rows = write_comparison(output, read_results(output, ["imagenet"], ["a", "b", "c"]))
    acc1 = {row["second"]: row for row in rows if row["metric"] == "acc1"}
    assert {row["first"] for row in rows} == {"a"} and set(acc1) == {"b", "c"}
    assert acc1["b"]["difference"] == pytest.approx(2 / 6) and acc1["c"]["difference"] == 0 and acc1["c"]["p"] == 1
    assert json.loads(Path(output.join("comparison.json")).read_text()) == rows
    told = lines(read_results(output, ["imagenet"], ["a", "b", "c"]), rows)
    assert told[0].split() == ["set", "metric", "a", "b", "c"]
    assert [line for line in told if line.startswith("imagenet, acc1: b - a = +0.3333 [")]
