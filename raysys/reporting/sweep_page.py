"""The page of a sweep: its points as means over seeds, what they keep and reach, and what became of each trial.

In: W/results.parquet, a row a trial (:data:`raysys.sweeping.results.Row`), with the space and the evaluators of W/settings.json; the
manifest only adds what the sweep took, so that a sweep that has not ended has a page too. Out: sections. Means, front and best point are
those of :mod:`raysys.sweeping.results`: a trial that did not finish is in no mean, and only a point of which every seed finished is on
the front or best.
"""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from raysys.console import duration
from raysys.evaluation.metrics import PRIMARY
from raysys.reporting import plots
from raysys.reporting.page import Folder, Section, Table, in_brackets, read_parquet
from raysys.storage import exists, join, read_bytes
from raysys.sweeping.results import Estimate, PointResult, Row, best_point, pareto_front, points_of

STATUSES = {
    "finished": "finished",
    "stopped": "stopped early",
    "failed": "failed",
    "crashed": "crashed (the same words try them again)",
    "missing": "not run to the end (the same words go on)",
}
MANY = 8
"""More values of a number than this make no columns of a heat map."""
MAX_ROWS = 20
"""Rows of a table that is not folded."""
MAX_LABELS = 12
"""Points of the front with their numbers in a plot."""
SCORE = "score"


@dataclass(frozen=True)
class Swept:
    rows: list[Row]
    points: list[PointResult]
    objectives: list[str]
    measures: list[str]
    """The objectives, and the score where it is not one of them."""
    varying: list[str]
    """Swept keys with more than one value."""
    ranges: set[str]
    """Keys of numbers with too many values for a heat map."""
    logs: set[str]
    """Keys whose range is a log one."""
    front: set[int]
    best: PointResult | None

    @property
    def complete(self) -> list[PointResult]:
        return [point for point in self.points if point.complete]


def sweep_sections(folder: Folder) -> list[Section]:
    file = join(folder.path, "results.parquet")
    if not exists(file):
        return [Section("Trials", ["Nothing to show yet: results.parquet is missing; the sweep has not ended."])]
    rows = read_parquet(file)
    space, evaluators = folder.settings.get("space"), folder.settings.get("evaluators")
    needed = ["trial", "point", "seed", "status", "reason", *(space or []), "steps", "kept_share", SCORE, "seconds"]
    if not isinstance(space, dict) or not evaluators or not rows or not set(needed) <= set(rows[0]):
        return [Section("Trials", ["Nothing to show: results.parquet or settings.json was not written by this version."])]
    swept = _swept(rows, space, [f"{name}/{PRIMARY[name]}" for name in evaluators], folder.settings.get("objective", "mean"))
    return [
        points_section(swept, folder.manifest),
        *kept_sections(swept),
        *front_sections(swept),
        *heat_sections(swept),
        *key_sections(swept),
        trials_section(swept),
        best_section(folder.path, swept),
    ]


def _swept(rows: list[Row], space: dict[str, Any], objectives: list[str], objective: str) -> Swept:
    points = points_of(rows, list(space), objectives)
    values = {key: {_text(point.values[key]) for point in points} for key in space}
    several = len(objectives) > 1 and objective in ("mean", "front")
    return Swept(
        rows=rows,
        points=points,
        objectives=objectives,
        measures=[*objectives, SCORE] if several else objectives,
        varying=[key for key in space if len(values[key]) > 1],
        ranges={key for key in space if _numeric(points, key) and (isinstance(space[key], dict) or len(values[key]) > MANY)},
        logs={key for key, span in space.items() if isinstance(span, dict) and span.get("log")},
        front=set(pareto_front(points)),
        best=best_point(points),
    )


def _text(value: Any, digits: int = 12) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}g}"
    return value if isinstance(value, str) else json.dumps(value)


def _numeric(points: Iterable[PointResult], key: str) -> bool:
    return all(isinstance(point.values[key], int | float) and not isinstance(point.values[key], bool) for point in points)


def _measured(point: PointResult, measure: str) -> Estimate | None:
    return point.score if measure == SCORE else point.objectives.get(measure)


# ---- tables -----------------------------------------------------------------------------------------------------------


def points_section(swept: Swept, manifest: dict[str, Any]) -> Section:
    """Counts on top; complete points first, the best of them first, then those that lack seeds."""
    status = Counter(row["status"] for row in swept.rows)
    became = ", ".join(f"{status[name]:,} {words}" for name, words in STATUSES.items() if status[name])
    num_seeds = max(len(point.trials) for point in swept.points)
    notes = [
        f"{_number(len(swept.points), 'point')}, {_number(num_seeds, 'seed')} each, {_number(len(swept.rows), 'trial')}: {became}. "
        f"All seeds finished of {len(swept.complete):,} of {_number(len(swept.points), 'point')}"
        + ("." if len(swept.complete) == len(swept.points) else "; the reasons of the others stand under Trials.")
    ]
    took = [row["seconds"] for row in swept.rows if row["seconds"] is not None]
    if "seconds" in manifest:
        alone = f"; its trials, one after another, are {duration(sum(took))}" if took else ""
        notes.append(f"How long it took: {duration(manifest['seconds'])} in the call that ended it{alone}.")
    decoded = manifest.get("decoded") or {}
    if decoded:
        notes.append(f"Pictures decoded for all trials together: {', '.join(f'{n:,} of {name}' for name, n in decoded.items())}.")
    notes.append(
        "Means over seeds; [low, high] and the bars are 95 % of the mean (Student's t): how much another draw of seeds would move it, "
        "not how much other pictures would."
        + (" With one seed there is none: a difference may be chance." if num_seeds == 1 else "")
    )
    notes.append(
        "★: on the front, no other point is at least as good in every objective and better in one. "
        + (f"Best (bold): point {swept.best.number}. " if swept.best else "No point is complete, so none is best. ")
        + "Only points of which all seeds finished count for either."
    )
    complete = sorted(swept.complete, key=lambda point: -point.score.mean if point.score else 0.0)
    shown = complete + [point for point in swept.points if not point.complete]
    head = ["", "point", *swept.varying, "seeds", "kept share", *swept.measures]
    rows = [
        [
            "★" if point.number in swept.front else "",
            str(point.number),
            *(_text(point.values[key], 4 if key in swept.ranges else 12) for key in swept.varying),
            f"{point.num_finished}/{len(point.trials)}",
            _estimate_cell(point.kept_share),
            *(_estimate_cell(_measured(point, measure)) for measure in swept.measures),
        ]
        for point in shown
    ]
    marked = {i for i, point in enumerate(shown) if swept.best and point.number == swept.best.number}
    tables = [Table(head, rows[:MAX_ROWS], marked)]
    if len(rows) > MAX_ROWS:
        tables.append(Table(head, rows[MAX_ROWS:], folded=f"{_number(len(rows) - MAX_ROWS, 'more point')}"))
    fixed = [f"{key}={_text(value)}" for key, value in swept.points[0].values.items() if key not in swept.varying]
    return Section("Points", notes + ([f"At every point: {', '.join(fixed)}."] if fixed else []), tables)


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}" + ("" if n == 1 else "s")


def _estimate_cell(own: Estimate | None) -> str | None:
    if own is None:
        return None
    spread = own.low is not None and own.high is not None and own.low < own.high
    return f"{own.mean:.2%}" + (f" {in_brackets(own.low, own.high)}" if spread else "")  # type: ignore[arg-type]  # spread: both are there


def trials_section(swept: Swept) -> Section:
    """Those that did not finish, with their reasons; all of them."""
    measures = [*swept.objectives, SCORE]
    head = ["trial", "point", "seed", "status", "steps", "kept share", *measures, "seconds"]

    def cells(row: Row) -> list[Any]:
        shares = (None if row.get(name) is None else f"{row[name]:.2%}" for name in ("kept_share", *measures))
        seconds = None if row["seconds"] is None else f"{row['seconds']:,.1f}"
        return [row["trial"], str(row["point"]), str(row["seed"]), row["status"], row["steps"], *shares, seconds]

    unfinished = [row for row in swept.rows if row["status"] != "finished"]
    notes = ["All metrics of each trial are in results.parquet."]
    if any(row["status"] == "stopped" for row in unfinished):
        notes.insert(0, "A trial stopped early has the numbers of its steps; it is in no mean and no plot.")
    tables = [
        Table(
            ["did not finish", "status", "steps", "reason"],
            [[r["trial"], r["status"], r["steps"], r["reason"]] for r in unfinished],
        )
    ]
    folded = f"All {len(swept.rows):,} trials" if len(swept.rows) > MAX_ROWS else ""
    return Section(
        "Trials", notes, [*(tables if unfinished else []), Table(head, [cells(row) for row in swept.rows], folded=folded)]
    )


def best_section(folder: str, swept: Swept) -> Section:
    best = join(folder, "best.yaml")
    if not exists(best):
        return Section("Best point (best.yaml)", ["No best.yaml: there is no point of which all seeds finished."])
    number = f": point {swept.best.number}" if swept.best else ""
    return Section(f"Best point (best.yaml){number}", text=read_bytes(best).decode())


# ---- plots ------------------------------------------------------------------------------------------------------------


def _groups(swept: Swept, x: dict[int, plots.Interval], y: dict[int, plots.Interval]) -> dict[str, list[plots.Spot]]:
    """Mark -> spots of the points that have both numbers (point -> number)."""
    groups: dict[str, list[plots.Spot]] = {name: [] for name in plots.MARKS}
    for point in swept.points:
        number = point.number
        if number not in x or number not in y:
            continue
        name = "front" if number in swept.front else "points" if point.complete else "not all seeds"
        label = str(number) if name == "front" and len(swept.front) <= MAX_LABELS else ""
        groups[name].append(plots.Spot(x[number], y[number], label))
        if swept.best and number == swept.best.number:
            groups["best"].append(plots.Spot((x[number][0], None, None), (y[number][0], None, None)))
    return groups


def _intervals(swept: Swept, measure: str) -> dict[int, plots.Interval]:
    estimates = {point.number: _measured(point, measure) for point in swept.points}
    return {number: (own.mean, own.low, own.high) for number, own in estimates.items() if own}


def kept_sections(swept: Swept) -> list[Section]:
    kept = {point.number: point.kept_share for point in swept.points if point.kept_share}
    shares = sorted({own.mean for own in kept.values()})
    if len(shares) < 2:
        return []  # every point learns of the same samples
    section = Section("Each objective against the share kept")
    crowds = {share: [number for number, own in kept.items() if own.mean == share] for share in shares}
    largest = max(map(len, crowds.values()))
    if largest > 1:
        section.notes.append("Points that keep the same share stand side by side.")
    gap = min(right - left for left, right in itertools.pairwise(shares))
    step = min((shares[-1] - shares[0]) / 40, gap / 2 / largest)
    x: dict[int, plots.Interval] = {
        number: (share + (place - (len(crowd) - 1) / 2) * step, None, None)
        for share, crowd in crowds.items()
        for place, number in enumerate(crowd)
    }
    for objective in swept.objectives:
        section.plots.append(
            plots.scatter(objective, "share of the corpus kept", "", _groups(swept, x, _intervals(swept, objective)), x_share=True)
        )
    return [section]


def front_sections(swept: Swept) -> list[Section]:
    if len(swept.complete) < 2:
        return []
    section = Section("The front")
    if len(swept.objectives) > 2:
        section.notes.append(
            f"The front is of {len(swept.objectives)} objectives; each plot shows two of them, so a star may look beaten in it."
        )
    for a, b in itertools.combinations(swept.objectives, 2):
        groups = _groups(swept, _intervals(swept, a), _intervals(swept, b))
        stairs = "front" if len(swept.objectives) == 2 else ""  # of more, its shadow on two axes is no staircase
        section.plots.append(plots.scatter(f"{b} against {a}", a, b, groups, x_share=True, stairs=stairs))
    return [section] if section.plots else []


def heat_sections(swept: Swept) -> list[Section]:
    """Every two keys against each other: cells where both have few values, dots where one is a range."""
    section = Section("Two keys against each other")
    pairs = list(itertools.combinations(swept.varying, 2))
    for measure in swept.measures if swept.complete else []:
        for a, b in pairs:
            if not swept.ranges & {a, b}:
                cells = heat_cells(swept, a, b, measure)
                section.plots += [plots.heat_map(measure, a, b, cells)] if any(map(math.isfinite, cells.values())) else []
            elif len(swept.varying) == 2 and _numeric(swept.points, a) and _numeric(swept.points, b):
                spots = [(p.values[a], p.values[b], own.mean) for p in swept.complete if (own := _measured(p, measure))]
                section.plots.append(plots.colored(measure, a, b, spots, x_log=a in swept.logs, y_log=b in swept.logs))
    if len(swept.varying) > 2:
        section.notes.append("A cell is the mean over all values of the keys that are not on its axes.")
    if not section.plots:
        return []
    if len(swept.complete) < len(swept.points):
        section.notes.append(
            "A point that lacks a seed is left out here: a mean of fewer seeds, or a cell of fewer points, is not comparable."
        )
    return [section]


def heat_cells(swept: Swept, a: str, b: str, measure: str) -> dict[tuple[str, str], float]:
    """(value of a, value of b) -> mean over the complete points there; NaN unless they have all values of the other keys.

    A cell that lacks some of them would differ from its neighbours by what it lacks.
    """
    others = [key for key in swept.varying if key not in (a, b)]

    def rest(point: PointResult) -> tuple[str, ...]:
        return tuple(_text(point.values[key]) for key in others)

    asked = {rest(point) for point in swept.points}
    found: dict[tuple[str, str], dict[tuple[str, ...], list[float]]] = {}
    for point in swept.complete:
        own = _measured(point, measure)
        if own:
            found.setdefault((_text(point.values[a]), _text(point.values[b])), {}).setdefault(rest(point), []).append(own.mean)
    means = {cell: fmean(map(fmean, of_rest.values())) for cell, of_rest in found.items() if set(of_rest) == asked}
    return {cell: means.get(cell, math.nan) for cell in itertools.product(_values(swept.points, a), _values(swept.points, b))}


def _values(points: list[PointResult], key: str) -> list[str]:
    """Numbers from small to large, words as they came."""
    values = [point.values[key] for point in points]
    return list(dict.fromkeys(_text(value) for value in (sorted(values) if _numeric(points, key) else values)))


def key_sections(swept: Swept) -> list[Section]:
    """Each objective against each range, and against the one key where only one varies."""
    section = Section("Each objective against a key")
    for key in swept.varying:
        if key not in swept.ranges and len(swept.varying) > 1:
            continue  # heat maps show it
        numeric = _numeric(swept.points, key)
        names = [] if numeric else _values(swept.points, key)
        x: dict[int, plots.Interval] = {
            p.number: (p.values[key] if numeric else names.index(_text(p.values[key])), None, None) for p in swept.points
        }
        for measure in swept.measures:
            groups = _groups(swept, x, _intervals(swept, measure))
            if any(groups.values()):
                section.plots.append(plots.scatter(measure, key, "", groups, x_log=key in swept.logs, x_names=names))
    return [section] if section.plots else []
