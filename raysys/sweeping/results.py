"""From trials to points: means over seeds with their intervals, the front, the best point; and the files and the table that show them.

In: what each trial wrote (:func:`row_of`). Out: W/{results.parquet, front.json, tensorboard}, lines for the screen. No Ray. Which trials
there are, and best.yaml, are left to :mod:`raysys.sweeping.on_ray`.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.board import new_board
from raysys.masking import mask
from raysys.storage import join, list_names, remove_folder, write_bytes, write_json

Row = dict[str, Any]
"""Columns of results.parquet, in this order: ``trial`` (its name), ``point`` (number), ``seed``, ``status``, ``reason``; the swept keys; ``steps``
(done), ``kept_share`` (samples kept / samples), ``score``; ``EVALUATOR/METRIC`` for every metric, objectives first; ``seconds`` and
``samples_per_s`` of the training. Status: ``finished``; ``stopped`` (early, by ASHA: its numbers are of ``steps``); ``failed`` (this point cannot
be trained: the reason says why); ``crashed`` (something broke: the same words try it again); ``missing`` (not begun, or not ended)."""
SWEPT_AFTER = {"trial": pa.string(), "point": pa.int64(), "seed": pa.int64(), "status": pa.string(), "reason": pa.string()}
"""The columns before the swept keys."""
METRICS_AFTER = {"steps": pa.int64(), "kept_share": pa.float64(), "score": pa.float64()}
"""Those between the swept keys and the metrics."""
LAST = {"seconds": pa.float64(), "samples_per_s": pa.float64()}
MAX_SHOWN = 40
"""Lines of the table for complete points, and as many for the others: what one looks at; results.parquet has all."""
MAX_REASON = 100
"""Characters of a reason in the table."""


@dataclass(frozen=True)
class Estimate:
    mean: float
    low: float | None
    high: float | None
    """95 % interval of the mean over seeds (Student's t); None with one seed."""


@dataclass(frozen=True)
class PointResult:
    """What the seeds of a point say together."""

    number: int
    values: dict[str, Any]
    """Swept key -> value."""
    trials: list[str]
    num_finished: int
    kept_share: Estimate | None
    objectives: dict[str, Estimate]
    """Over the finished trials; empty where there is none."""
    score: Estimate | None
    reason: str | None
    """Of the first trial that did not finish."""

    @property
    def complete(self) -> bool:
        """All its seeds finished: only such a point may be best or on the front, else a lucky seed would stand for it."""
        return self.num_finished == len(self.trials)


# ---- trials and points ------------------------------------------------------------------------------------------------


def row_of(
    trial: str,
    point: int,
    seed: int,
    values: dict[str, Any],
    result: dict[str, Any] | None,
    *,
    objectives: list[str],
    objective: str,
) -> Row:
    """A trial's row.

    :param trial: its name.
    :param values: swept key -> value.
    :param result: its ``result.json``: ``status``, and where known ``reason``, ``steps``, ``kept_share``, ``metrics`` by evaluator,
        ``seconds``, ``samples_per_s``; None where there is none yet.
    :param objectives: ``EVALUATOR/METRIC`` of each evaluator.
    :param objective: what ``score`` is: an evaluator's objective, or the mean of all (``mean``; ``front`` has no number of its own).
    :returns: a finished or stopped trial without a finite number for each objective has become ``failed``, and says which; only
        finished and stopped trials have a score.
    """
    assert not values.keys() & (SWEPT_AFTER | METRICS_AFTER | LAST).keys(), f"a swept key has the name of a column: {list(values)}"
    if result is None:
        result = {"status": "missing", "reason": "not run to its end; the same words go on"}
    measured = {
        f"{name}/{metric}": value for name, metrics in result.get("metrics", {}).items() for metric, value in metrics.items()
    }
    status, reason, score = result["status"], result.get("reason"), None
    if status in ("finished", "stopped"):
        bad = {name: measured.get(name) for name in objectives if not _is_finite(measured.get(name))}
        if bad:
            status = "failed"
            reason = ", ".join(f"{name} is {'missing' if value is None else value}" for name, value in bad.items())
        else:
            score = fmean(measured[name] for name in objectives if objective in ("mean", "front", name.split("/")[0]))
    return {
        "trial": trial,
        "point": point,
        "seed": seed,
        "status": status,
        "reason": reason,
        **values,
        "steps": result.get("steps"),
        "kept_share": result.get("kept_share"),
        "score": score,
        **dict.fromkeys(objectives),
        **measured,
        "seconds": result.get("seconds"),
        "samples_per_s": result.get("samples_per_s"),
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def points_of(rows: list[Row], keys: list[str], objectives: list[str]) -> list[PointResult]:
    """The points of the rows, by number.

    :param keys: the swept ones.
    """
    by_point: dict[int, list[Row]] = {}
    for row in rows:
        by_point.setdefault(row["point"], []).append(row)
    points = []
    for number, trials in sorted(by_point.items()):
        finished = [row for row in trials if row["status"] == "finished"]
        shares = [row["kept_share"] for row in finished if row["kept_share"] is not None]
        points.append(
            PointResult(
                number=number,
                values={key: trials[0][key] for key in keys},
                trials=[row["trial"] for row in trials],
                num_finished=len(finished),
                kept_share=estimate(shares) if shares else None,
                objectives={name: estimate([row[name] for row in finished]) for name in objectives} if finished else {},
                score=estimate([row["score"] for row in finished]) if finished else None,
                reason=next((row["reason"] for row in trials if row["status"] != "finished"), None),
            )
        )
    return points


def estimate(values: Sequence[float]) -> Estimate:
    """Mean of n >= 1 values and its 95 % interval: mean ± t(.975, n - 1) s / sqrt(n), s the standard deviation with n - 1.

    Student (1908), The probable error of a mean, Biometrika 6(1); NIST/SEMATECH e-Handbook of Statistical Methods, sec. 1.3.5.2. It holds
    for seeds whose numbers are about normal, knows no bounds (an accuracy's interval may pass 1), and is wide for few: t = 12.7, 4.3, 3.2
    for n = 2, 3, 4.
    """
    from scipy import stats  # takes longer to load than the rest of this module together

    mean, n = fmean(values), len(values)
    if n == 1:
        return Estimate(mean, None, None)
    half = float(stats.t.ppf(0.975, n - 1)) * stdev(values) / math.sqrt(n)
    return Estimate(mean, mean - half, mean + half)


def pareto_front(points: list[PointResult]) -> list[int]:
    """Numbers of the complete points that no other complete point beats on the means: at least as good in every objective, better in one."""
    means = {point.number: [own.mean for own in point.objectives.values()] for point in points if point.complete}

    def beats(a: list[float], b: list[float]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [number for number, own in means.items() if not any(beats(other, own) for other in means.values())]


def best_point(points: list[PointResult]) -> PointResult | None:
    """The complete point with the largest mean score; of equal ones the smallest number. None where no point is complete."""
    return next(iter(_best_first(points)), None)


def _best_first(points: list[PointResult]) -> list[PointResult]:
    """The complete ones."""
    scored = [(-point.score.mean, point.number, point) for point in points if point.complete and point.score is not None]
    return [point for _, _, point in sorted(scored, key=lambda entry: entry[:2])]


# ---- files ------------------------------------------------------------------------------------------------------------


def write_tables(folder: str, rows: list[Row], points: list[PointResult], objectives: list[str]) -> None:
    """``results.parquet``, a row a trial (:data:`Row`), and ``front.json``, the points of the front, best score first.

    Columns have their types also where all is null. A swept key whose values are of several types (or lists) is written as strings.
    """
    keys = list(points[0].values) if points else []
    own = [*SWEPT_AFTER, *keys, *METRICS_AFTER, *LAST]
    metrics = dict.fromkeys([*objectives, *(name for row in rows for name in row if name not in own)])

    def columns(types: dict[str, pa.DataType]) -> dict[str, pa.Array]:
        return {name: pa.array([row.get(name) for row in rows], kind) for name, kind in types.items()}

    content = {
        **columns(SWEPT_AFTER),
        **{key: _swept_column([row[key] for row in rows]) for key in keys},
        **columns(METRICS_AFTER | dict.fromkeys(metrics, pa.float64()) | LAST),
    }
    file = io.BytesIO()
    pq.write_table(pa.table(content), file)
    write_bytes(join(folder, "results.parquet"), file.getvalue())
    front = pareto_front(points)
    write_json(join(folder, "front.json"), [_as_json(point) for point in _best_first(points) if point.number in front])


def _swept_column(values: list[Any]) -> pa.Array:
    types = {type(value) for value in values if value is not None}
    if types == {bool}:
        return pa.array(values, pa.bool_())
    if types and types <= {int, float}:
        return pa.array(values, pa.int64() if types == {int} else pa.float64())
    return pa.array([None if value is None else _text(value) for value in values], pa.string())


def _as_json(point: PointResult) -> dict[str, Any]:
    content = asdict(point)
    return {"point": point.number} | {key: content[key] for key in ("values", "trials", "kept_share", "objectives", "score")}


def _text(value: Any) -> str:
    """A value as one writes it on the command line."""
    return mask(value) if isinstance(value, str) else json.dumps(value)


def write_hparams(folder: str, rows: list[Row], keys: list[str], objectives: list[str]) -> None:
    """``tensorboard/TRIAL`` of each finished or stopped trial, for TensorBoard's HParams; what an earlier call wrote goes.

    Hyper-parameters: the swept keys and the seed. Metrics, by the tags that the trial's own board has for them: the objectives, their mean
    (``val/score``), ``data/kept_share``, and ``train/steps``, which tells a stopped trial. A key with a value that is no number (null, a
    list) is written as strings throughout.
    """
    rows = [row for row in rows if row["status"] in ("finished", "stopped")]
    numeric = {key for key in keys if all(_is_number(row[key]) for row in rows)}
    metrics = [*(f"val/{name}" for name in objectives), "val/score", "data/kept_share", "train/steps"]
    for row in rows:
        hyper = {key: row[key] if key in numeric else _text(row[key]) for key in keys} | {"seed": row["seed"]}
        numbers = {f"val/{name}": row[name] for name in objectives} | {
            "val/score": fmean(row[name] for name in objectives),  # of all, also where the sweep goes by one
            "data/kept_share": row["kept_share"],
            "train/steps": row["steps"],
        }
        with new_board(join(folder, "tensorboard", row["trial"])) as board:
            board.hparams(hyper, metrics, row["trial"])
            board.scalars({tag: value for tag, value in numbers.items() if value is not None}, row["steps"])
    for trial in set(list_names(join(folder, "tensorboard"))) - {row["trial"] for row in rows}:
        remove_folder(join(folder, "tensorboard", trial))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# ---- the table --------------------------------------------------------------------------------------------------------


def table(rows: list[Row], points: list[PointResult], keys: list[str], objectives: list[str], best: int | None) -> list[str]:
    """Lines for the screen, one a point: complete ones, best score first, then the others with what ended them; what the marks mean below.

    :param best: number of the best point.
    """
    unfinished = {row["point"]: row for row in reversed(rows) if row["status"] != "finished"}  # the first of each point
    front = set(pareto_front(points))
    complete = [point for i, point in enumerate(_best_first(points)) if i < MAX_SHOWN or point.number in front]
    others = sorted((p for p in points if not p.complete), key=lambda p: (unfinished[p.number]["status"] == "stopped", p.number))
    shown = complete + others[:MAX_SHOWN]
    varying = [key for key in keys if len({_text(point.values[key]) for point in points}) > 1]

    left = [
        _column("", ["*" if point.number in front else "" for point in shown]),
        _column("point", [str(point.number) for point in shown], right=True),
        *(_column(key, _value_cells([point.values[key] for point in shown])) for key in varying),
        _column("seeds", [_seeds(point) for point in shown], right=True),
    ]
    right = [
        _column("kept", [f"{point.kept_share.mean:.1%}" if point.kept_share else "-" for point in shown], right=True),
        *(_column(name, [_estimate_cell(point.objectives.get(name)) for point in shown]) for name in objectives),
        _column("score", [_estimate_cell(point.score) for point in shown]),
    ]
    left_lines, right_lines = (["  ".join(cells) for cells in zip(*columns, strict=True)] for columns in (left, right))
    lines = [f"{left_lines[0]}  {right_lines[0]}"]
    for point, values, numbers in zip(shown, left_lines[1:], right_lines[1:], strict=True):
        note = [] if point.complete else [_what_ended(unfinished[point.number])]
        lines.append("  ".join([values, *([numbers] if point.num_finished else []), *note]))
    fixed = [f"{key}={_text(points[0].values[key])}" for key in keys if key not in varying] if points else []
    legend = [
        f"every point: {', '.join(fixed)}" if fixed else "",
        f"{len(points) - len(shown)} more points are not shown; results.parquet has all" if len(shown) < len(points) else "",
        "numbers are means over a point's finished seeds, [ ] their 95 % interval (Student's t); one seed alone has none",
        "a point of which not every seed finished stands last, and is neither on the front nor best" if others else "",
        "a stopped trial is in no mean: its numbers are of fewer steps" if any(row["status"] == "stopped" for row in rows) else "",
        *_same_trainings(rows, points, objectives),
        "* is the Pareto front of the means: no other complete point is as good in every objective and better in one; "
        + ("no point is complete, so none is best" if best is None else f"best by score: point {best}"),
    ]
    return [line.rstrip() for line in lines] + [line for line in legend if line]


def _same_trainings(rows: list[Row], points: list[PointResult], objectives: list[str]) -> list[str]:
    """A line for points that cannot be told apart: they look like a finding and are a waste."""
    numbers: dict[tuple[float, ...], list[int]] = {}
    for point in points:
        if point.complete:
            own = tuple(row[name] for row in rows if row["point"] == point.number for name in objectives)
            numbers.setdefault(own, []).append(point.number)
    return [
        f"points {', '.join(map(str, same))} have the same numbers in every seed and objective: probably the same training "
        "(two values of augment.factor differ only after as many passes as the smaller one has views)"
        for same in numbers.values()
        if len(same) > 1
    ]


def _column(head: str, cells: list[str], *, right: bool = False) -> list[str]:
    """Padded to one width."""
    width = max(map(len, [head, *cells]))
    return [cell.rjust(width) if right else cell.ljust(width) for cell in [head, *cells]]


def _value_cells(values: list[Any]) -> list[str]:
    """Floats with the same number of digits after the point."""
    numbers = [value for value in values if _is_number(value)]
    spec = ""
    if any(isinstance(value, float) for value in numbers):
        short = [f"{value:.4g}" for value in numbers]
        spec = ".2e" if any("e" in text for text in short) else f".{max(len(text.partition('.')[2]) for text in short)}f"
    return [format(value, spec) if _is_number(value) else _text(value) for value in values]


def _seeds(point: PointResult) -> str:
    return str(point.num_finished) if point.complete else f"{point.num_finished}/{len(point.trials)}"


def _estimate_cell(own: Estimate | None) -> str:
    if own is None:
        return "-"
    return f"{own.mean:.4f}" + (f" [{own.low:.4f}, {own.high:.4f}]" if own.low is not None else "")


def _what_ended(row: Row) -> str:
    """Of a trial that did not finish."""
    after = f" after {row['steps']} steps" if row["steps"] else ""
    then = f" with score {row['score']:.4f}" if row["score"] is not None else ""
    reason = next(iter((row["reason"] or "").strip().splitlines()), "")
    cut = reason if len(reason) <= MAX_REASON else reason[: MAX_REASON - 1] + "…"
    return f"{row['trial']}: {row['status']}{after}{then}" + (f": {cut}" if cut else "")
