"""What ``raysys evaluate`` writes and prints: a JSON for each set and model, predictions, comparisons, a table. No Ray.

In: :class:`SetResult`. Out: E/results/<set>_<model>.json (CLIP_benchmark's shape, and intervals), E/predictions/<set>_<model>.parquet,
E/comparison.json, and lines for the screen.
"""

from __future__ import annotations

import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import ModelConfig, ServiceConfig
from raysys.evaluation.evaluator import ATTACKED, SetResult
from raysys.evaluation.metrics import PRIMARY, compare, drop, intervals
from raysys.masking import mask
from raysys.output import Output
from raysys.storage import exists, read_bytes, read_json, write_bytes, write_json

CLEAN = "imagenet"


def result_file(output: Output, evaluator: str, name: str) -> str:
    """:param name: of the model, in file names."""
    return output.join("results", f"{evaluator}_{name}.json")


def predictions_file(output: Output, evaluator: str, name: str) -> str:
    return output.join("predictions", f"{evaluator}_{name}.parquet")


def write_result(
    output: Output, name: str, model: ModelConfig, service: ServiceConfig, result: SetResult, fingerprint: str
) -> None:
    """Predictions first: where the JSON is, the set is done.

    :param fingerprint: of the set.
    """
    file = io.BytesIO()
    pq.write_table(result.predictions, file)
    write_bytes(predictions_file(output, result.evaluator, name), file.getvalue())
    content: dict[str, Any] = {
        "dataset": result.dataset,
        "model": mask(model.model),
        "pretrained": mask(model.pretrained or ""),
        "task": result.task,
        "metrics": result.metrics,
        "language": "en",
        "name": name,
        "evaluator": result.evaluator,
        "set": fingerprint,
        "precision": service.precision,
        "intervals": {metric: list(ends) for metric, ends in intervals(result.task, result.predictions).items()},
        "notes": result.notes,
    }
    if result.evaluator == ATTACKED and exists(predictions_file(output, CLEAN, name)):
        lost = drop(read_predictions(output, CLEAN, name), result.predictions)
        if lost is not None:
            content["drop"] = {"value": lost.value, "low": lost.low, "high": lost.high}
    # not write_json: nothing else may lie in the folder of results, not for a moment
    body = json.dumps(content, indent=2, ensure_ascii=False).encode()
    write_bytes(result_file(output, result.evaluator, name), body, tmp_folder=output.path)


def read_predictions(output: Output, evaluator: str, name: str) -> pa.Table:
    return pq.read_table(io.BytesIO(read_bytes(predictions_file(output, evaluator, name))))


def read_results(output: Output, evaluators: list[str], names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """By set, a result for each model."""
    return {evaluator: [read_json(result_file(output, evaluator, name)) for name in names] for evaluator in evaluators}


def write_comparison(output: Output, results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Every further model against the first, metric by metric."""
    rows = []
    for evaluator, (first, *others) in results.items():
        before = read_predictions(output, evaluator, first["name"])
        for other in others:
            differences = compare(first["task"], before, read_predictions(output, evaluator, other["name"]))
            who = {"evaluator": evaluator, "first": first["name"], "second": other["name"]}
            rows += [
                who | {"metric": metric, "difference": d.value, "low": d.low, "high": d.high, "p": d.p}
                for metric, d in differences.items()
            ]
    write_json(output.join("comparison.json"), rows)
    return rows


def lines(results: dict[str, list[dict[str, Any]]], comparison: list[dict[str, Any]]) -> list[str]:
    """The table on screen, notes below it; of a comparison the metrics that stand for their sets."""
    head = ["set", "metric", *(result["name"] for result in next(iter(results.values())))]
    rows, notes = [], []
    for evaluator, of_models in results.items():
        label = evaluator if of_models[0]["dataset"] == evaluator else f"{evaluator} ({of_models[0]['dataset']})"
        for metric in of_models[0]["metrics"]:
            rows.append([label, metric, *(_cell(result, metric) for result in of_models)])
        if any("drop" in result for result in of_models):
            rows.append([label, "acc1_drop (clean - attacked)", *(_drop_cell(result.get("drop")) for result in of_models)])
        notes += [f"{label}: {note}" for note in of_models[0]["notes"]]
    text = _aligned([head, *rows])
    for row in comparison:
        if row["metric"] == PRIMARY[row["evaluator"]]:
            what = f"{row['evaluator']}, {row['metric']}: {row['second']} - {row['first']}"
            text.append(f"{what} = {row['difference']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}], p = {row['p']:.2g}")
    return text + notes + ["[ ] is 95 % of a bootstrap over pictures; what is asked stays the same"]


def _cell(result: dict[str, Any], metric: str) -> str:
    value = result["metrics"].get(metric)
    if value is None or isinstance(value, int):
        return "-" if value is None else str(value)
    low, high = result["intervals"].get(metric, (None, None))
    return f"{value:.4f}" + (f" [{low:.4f}, {high:.4f}]" if low is not None else "")


def _drop_cell(lost: dict[str, float] | None) -> str:
    return "-" if lost is None else f"{lost['value']:.4f} [{lost['low']:.4f}, {lost['high']:.4f}]"


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
