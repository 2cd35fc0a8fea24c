"""``raysys report PATH``: one self-contained page about any output folder.

In: a folder that a verb wrote (told by settings.json's "verb"). Out: PATH/report.html. The module reads as it works: load the
folder, turn it into sections (a module for each kind of page, the demo composes them), render page.html.j2 with autoescape on.
Nothing on the page asks for anything outside it; a missing optional file is said in its section.
"""

from __future__ import annotations

import json
import secrets
import shlex
from collections.abc import Callable
from typing import Any

import jinja2

from raysys.config import ReportConfig
from raysys.console import tell_result
from raysys.errors import UserError
from raysys.masking import mask
from raysys.reporting import plots
from raysys.reporting.evaluation_page import attack_sections, attacked_section, evaluate_sections, results_sections
from raysys.reporting.evidence_page import annotate_sections, filter_sections
from raysys.reporting.page import Folder, Section, Table, counts_table, load_folder
from raysys.reporting.sweep_page import sweep_sections
from raysys.storage import absolute, exists, join, read_json, write_bytes
from raysys.training.metrics import read_metrics

# ---- sections of the small pages --------------------------------------------------------------------------------------


def series_of(run: str) -> dict[str, tuple[list[float], list[float]]]:
    """A run's metrics.jsonl -> metric -> (steps, values)."""
    series: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_metrics(run):
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float) and not isinstance(value, bool):
                steps, values = series.setdefault(key, ([], []))
                steps.append(row["step"])
                values.append(value)
    return series


def training_section(runs: dict[str, str]) -> Section:
    """:param runs: name -> run folder; each metric is one plot with a line for each run."""
    section = Section("Training")
    metrics: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
    for name, run in runs.items():
        if not exists(join(run, "metrics.jsonl")):
            section.notes.append(f"No metrics of {name}: metrics.jsonl is missing.")
            continue
        for metric, series in series_of(run).items():
            metrics.setdefault(metric, {})[name] = series
    same = {metric: {value for _, values in series.values() for value in values} for metric, series in metrics.items()}
    moving = {metric: series for metric, series in metrics.items() if len(same[metric]) > 1}
    section.plots = [plots.lines(metric, "step", series) for metric, series in moving.items()]
    steady = [[metric, *same[metric]] for metric in metrics if metric not in moving]
    section.tables = [Table(["the same in every line", ""], steady)] if steady else []
    return section


def train_sections(folder: Folder) -> list[Section]:
    return [Section("The run", tables=counts_table(folder)), training_section({"run": folder.path})]


def demo_sections(folder: Folder) -> list[Section]:
    first = Section("Does the filter help?")
    if exists(join(folder.path, "results.json")):
        results = read_json(join(folder.path, "results.json"))
        raw, filtered = results["raw"], results["filtered"]
        rows = [[k, f"{raw[k]:.1%}", f"{filtered[k]:.1%}", f"{100 * (filtered[k] - raw[k]):+.1f}"] for k in raw if k in filtered]
        first.tables = [Table(["", "raw: trained on everything", "filtered: on what was kept", "difference in points"], rows)]
        series = {"raw": raw, "filtered": filtered}
        first.plots = [plots.grouped_bars("Both models", {k: {s: v[k] for s, v in series.items()} for k in raw if k in filtered})]
        detector = results.get("text_detector") or {}
        first.tables += [
            Table(["text filter against the truth", ""], [[k.replace("_", " "), f"{v:.1%}"] for k, v in detector.items()])
        ]
    else:
        first.notes.append("No results yet: results.json is missing; the demo has not ended.")
    sections = [first]
    if exists(join(folder.path, "selection", "settings.json")):
        sections += filter_sections(load_folder(join(folder.path, "selection")), join(folder.path, "annotations"))
    sections.append(training_section({name: join(folder.path, name) for name in ("raw", "filtered")}))
    evaluation = join(folder.path, "evaluation")
    evaluated = load_folder(evaluation) if exists(join(evaluation, "settings.json")) else None
    sections += results_sections(evaluated) if evaluated else []
    return [*sections, attacked_section(join(folder.path, "attacked"), evaluated)]


SECTIONS: dict[str, Callable[[Folder], list[Section]]] = {
    "annotate": annotate_sections,
    "filter": filter_sections,
    "train": train_sections,
    "evaluate": evaluate_sections,
    "attack": attack_sections,
    "sweep": sweep_sections,
    "demo": demo_sections,
}


# ---- render -----------------------------------------------------------------------------------------------------------


def made_with(folder: Folder) -> Section:
    """Settings, times and versions, last on every page."""
    facts = {k: v for k, v in folder.manifest.items() if k not in ("counts", "verb", "versions")} | folder.manifest.get(
        "versions", {}
    )
    rows = [[k.replace("_", " "), v if isinstance(v, str | int | float | None) else json.dumps(v)] for k, v in facts.items()]
    settings = json.dumps(folder.settings, indent=2, ensure_ascii=False)
    return Section("How it was made", tables=[Table(["", ""], rows)] if rows else [], text=settings)


def _masked(value: Any) -> Any:
    """Everything that a page shows, but for what is markup already."""
    return mask(value) if type(value) is str else value


def show(value: Any) -> str:
    """A cell: thousands separated, four digits of a fraction, nothing as a dash."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def report(path: str) -> str:
    """Write PATH/report.html and return its path. :raises UserError: where PATH is no output of raysys."""
    folder = load_folder(absolute(path))
    if folder.verb not in SECTIONS:
        raise UserError(f"{mask(path)}: {folder.verb} has no page; give the output of {', '.join(SECTIONS)}")
    sections = [*SECTIONS[folder.verb](folder), made_with(folder)]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("raysys.reporting", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined, finalize=_masked,
    )  # fmt: skip
    environment.filters["show"] = show
    page = environment.get_template("page.html.j2").render(
        folder=folder, place=folder.path, sections=sections, nonce=secrets.token_urlsafe(16)
    )
    target = join(folder.path, "report.html")
    write_bytes(target, page.encode())
    return target


def report_verb(cfg: ReportConfig) -> None:
    """``raysys report PATH``."""
    page = mask(report(cfg.path))
    tell_result(page, next_words=f"open {shlex.quote(page)} in a browser")
