"""The pages of an evaluation and of an attacked set: what each model answered, next to what is published, and the pictures.

In: E, O. Out: sections. Figures of others stand beside, with their source, only where they are answers to the same questions.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from raysys.config import ClassSetConfig
from raysys.errors import UserError
from raysys.evaluation.metrics import PRIMARY
from raysys.masking import mask, resolved
from raysys.regions.gallery import MAX_PICTURES
from raysys.reporting import plots
from raysys.reporting.page import Folder, Section, Table, counts_table, in_brackets, picture, read_parquet
from raysys.storage import exists, join, list_files, read_json

RETRIEVAL = [f"{side}_retrieval_recall@{k}" for side in ("image", "text") for k in (1, 5, 10)]
AUTHORS = "Rows with a star: the authors' figures on all 50,000 validation pictures, 80 prompts; compare on the same pictures only."
REFERENCES: dict[str, tuple[str, list[str], dict[str, list[float]]]] = {
    # dataset -> (source, metrics, model -> percent); figures on other pictures are not comparable, so it is said beside them
    "imagenet": (AUTHORS, ["acc1"], {
        "OpenAI CLIP B/16, 400M": [68.35], "OpenCLIP B/16 (laion400m_e32), 400M": [66.99],
        "authors' CLIP B/16, 1.1B": [68.66], "authors' filter-based CLIP B/16, 0.7B": [70.77],
    }),
    "imagenet_attr": (AUTHORS, ["acc1"], {
        "OpenAI CLIP B/16, 400M": [31.65], "OpenCLIP B/16 (laion400m_e32), 400M": [29.55],
        "authors' CLIP B/16, 1.1B": [35.73], "authors' filter-based CLIP B/16, 0.7B": [68.78],
    }),
    "coco": ("Rows with a star: open_clip's models on mscoco_captions, the Karpathy 5k split of val2014; val2017 is another set.",
        RETRIEVAL, {
        "B/16 openai": [33.09, 58.42, 68.99, 52.42, 76.70, 84.62], "B/32 openai": [30.44, 55.94, 66.87, 50.12, 75.00, 83.52],
        "B/16 laion400m_e32": [38.35, 63.62, 73.86, 55.42, 79.64, 86.88],
        "B/16 datacomp_xl": [40.16, 65.95, 75.62, 57.44, 80.86, 88.30],
    }),
}  # fmt: skip


def read_results(evaluation: Folder) -> dict[str, list[dict[str, Any]]]:
    """By evaluator, its results in the order in which the user named the models."""
    root, names = list_files(join(evaluation.path, "results"), ".json")
    results = [read_json(join(root, name)) for name in names]
    other = next((name for name, r in zip(names, results, strict=True) if not {"name", "evaluator", "intervals"} <= set(r)), None)
    if other is not None:
        raise UserError(f"{mask(join(root, other))} was not written by this version; evaluate again into a new folder")
    order = list(evaluation.settings.get("models") or {})
    results.sort(key=lambda r: (order.index(r["name"]) if r["name"] in order else len(order), r["name"]))
    asked = {r["evaluator"] for r in results}
    return {evaluator: [r for r in results if r["evaluator"] == evaluator] for evaluator in PRIMARY if evaluator in asked}


def results_sections(evaluation: Folder) -> list[Section]:
    """All sets in one plot, one section a set, then the models against each other."""
    try:
        by_evaluator = read_results(evaluation)
    except UserError as error:
        return [Section("Results", [f"Nothing to show: {error}."])]
    return [
        overview_section(by_evaluator),
        *(set_section(evaluator, results) for evaluator, results in by_evaluator.items()),
        *comparison_sections(evaluation.path),
    ]


def overview_section(by_evaluator: dict[str, list[dict[str, Any]]]) -> Section:
    groups: dict[str, dict[str, tuple[float, float, float]]] = {}
    for evaluator, results in by_evaluator.items():
        metric = PRIMARY[evaluator]
        groups[f"{evaluator}\n{metric}"] = {r["name"]: (r["metrics"][metric], *r["intervals"][metric]) for r in results}
    note = (
        "[low, high] and the bars are 95 % of a bootstrap over the pictures of each set: its classes, or its gallery, stay as they are. "
        "A share of exactly 0 or 100 % has none: n pictures cannot tell it from 3 / n."
    )
    models = {r["name"]: [r["name"], r["model"], r["pretrained"]] for results in by_evaluator.values() for r in results}
    table = Table(["name", "model", "pretrained"], list(models.values()))
    return Section("Results", [note], [table], [plots.dots("What stands for each set", groups)])


def set_section(evaluator: str, results: list[dict[str, Any]]) -> Section:
    """The models evaluated here, then the reference rows where there are some for these classes."""
    source, metrics, reference = REFERENCES.get(evaluator, ("", [], {}))
    if any(r["metrics"].get("num_classes", 1000) != 1000 for r in results):
        source, metrics, reference = "", [], {}  # other questions than ImageNet's
    shares = list(dict.fromkeys([*metrics, *(m for r in results for m in r["metrics"] if not m.startswith("num_"))]))
    with_drop = any("drop" in r for r in results)
    rows: list[list[Any]] = []
    for r in results:
        cells = [(r["metrics"].get(m), r["intervals"].get(m)) for m in shares]
        if with_drop:
            lost = r.get("drop")
            cells.append((lost["value"], (lost["low"], lost["high"])) if lost else (None, None))
        shown = [None if value is None or ends is None else f"{value:.2%} {in_brackets(*ends)}" for value, ends in cells]
        rows.append([r["name"], *shown])
    for model, values in reference.items():
        known = dict(zip(metrics, values, strict=True))
        rows.append([f"* {model}", *(f"{known[m]:.2f}%" if m in known else None for m in shares), *[None] * with_drop])
    head = ["model", *(m.replace("_", " ") for m in shares), *["acc1 drop (clean - attacked)"] * with_drop]
    counts = [f"{v:,} {m.removeprefix('num_').replace('_', ' ')}" for m, v in results[0]["metrics"].items() if m.startswith("num_")]
    notes = list(dict.fromkeys(note for r in results for note in r["notes"]))
    notes += [f"Precision {p}: not the numbers of fp32." for p in dict.fromkeys(r["precision"] for r in results) if p != "fp32"]
    title = evaluator if results[0]["dataset"] == evaluator else f"{evaluator}: {results[0]['dataset']}"
    table = Table(head, rows, marked=set(range(len(results))))
    return Section(title, [", ".join(counts), *notes, *([source] if source else [])], [table])


def comparison_sections(folder: str) -> list[Section]:
    """Every two models that were compared; in bold what stands for a set."""
    if not exists(join(folder, "comparison.json")):
        return []
    found = read_json(join(folder, "comparison.json"))
    rows = []
    for d in found:
        models, points = f"{d['second']} - {d['first']}", f"{100 * d['difference']:+.2f}"
        rows.append([d["evaluator"], d["metric"], models, points, in_brackets(d["low"], d["high"]), d["p"]])
    notes = [
        "Differences in points, with 95 % of a paired bootstrap. p: two-sided, by exchanging the two models' answers to a picture at random "
        "(for one question a picture, McNemar's test); for one metric alone, so of twenty with p = 0.05 one is chance."
    ]
    head = ["set", "metric", "models", "difference", "95 %", "p"]
    marked = {i for i, d in enumerate(found) if d["metric"] == PRIMARY[d["evaluator"]]}
    return [Section("Models compared", notes, [Table(head, rows, marked)])]


DRAWN = ("font", "font_px", "color", "x_px", "y_px", "rotation_deg", "background", "visible_share")
"""Columns of attack.parquet: how the text was drawn."""


def fact(column: str, value: Any) -> str:
    """A value of DRAWN for the page."""
    if value is None:
        return "none"
    return f"{value:.0%}" if column == "visible_share" else f"{value:.1f}" if isinstance(value, float) else str(value)


def attacked_section(attack: str, evaluation: Folder | None) -> Section:
    """Some attacked pictures, evenly spaced over the set, how each was drawn, and what each model answered.

    :param evaluation: of models; without its file of predictions a model is left out, and the page says so.
    """
    from raysys.evaluation.class_sets import read_class_set  # brings torch: seconds; only here

    section = Section("Attacked pictures")
    try:
        # what is asked plays no part here, so the templates need not be found
        attacked = read_class_set(ClassSetConfig(path=attack, templates="simple"), attacked=True)
        rows = read_parquet(join(attack, "attack.parquet"))
    except UserError as error:
        section.notes.append(f"Nothing to show: {error}.")
        return section
    answers, missing = answers_of(evaluation) if evaluation else ({}, [])
    section.notes += missing
    values = {column: [row[column] for row in rows] for column in DRAWN if column in rows[0]}
    varies = [column for column, of_rows in values.items() if any(value != of_rows[0] for value in of_rows)]
    section.tables = [Table(["drawn with", ""], [[c, spread(c, of_rows)] for c, of_rows in values.items()])]
    picture_of = {picture.name: picture for picture in attacked.pictures}

    def called(label: int) -> str:
        return attacked.class_names[label]

    shown = []
    for i in np.linspace(0, len(rows) - 1, min(MAX_PICTURES, len(rows))).astype(int):
        row = rows[i]
        lines = [f"shows {called(row['true_class'])}", f"says “{row['text']}”"]
        lines += [" · ".join(f"{c} {fact(c, row[c])}" for c in varies)] if varies else []
        for name, answered in answers.items():
            if row["picture"] in answered:
                answer = answered[row["picture"]]
                said = answer["predicted_class"]
                verdict = "✓" if said == answer["true_class"] else "✗ read it" if said == answer["written_class"] else "✗"
                lines.append(f"{name}: {called(said)} {verdict}")
        shown.append(picture(picture_of[row["picture"]].read, lines))
    section.groups = [(f"{len(shown)} of {len(rows):,}, evenly spaced", shown)]
    return section


def answers_of(evaluation: Folder) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Model -> attacked picture -> its row of predictions; and a note for each model that has none."""
    try:
        names = [result["name"] for result in read_results(evaluation).get("imagenet_attr", [])]
    except UserError:
        return {}, []  # said where the results are shown
    files = {name: join(evaluation.path, "predictions", f"imagenet_attr_{name}.parquet") for name in names}
    found = {name: {row["picture"]: row for row in read_parquet(file)} for name, file in files.items() if exists(file)}
    return found, [f"No answers of {name}: {os.path.basename(files[name])} is missing." for name in names if name not in found]


def spread(column: str, values: list[Any]) -> str:
    """One value, or from where to where it goes, or how many there are."""
    distinct = list({str(value): value for value in values}.values())
    if len(distinct) == 1:
        return fact(column, distinct[0])
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in distinct):
        return f"{fact(column, min(distinct))} to {fact(column, max(distinct))}"
    return f"{len(distinct):,} different" + (
        f": {', '.join(fact(column, value) for value in distinct)}" if len(distinct) < 9 else ""
    )


def evaluate_sections(folder: Folder) -> list[Section]:
    attack = resolved((folder.settings.get("imagenet_attr") or {}).get("path"))
    return results_sections(folder) + ([attacked_section(attack, folder)] if attack else [])


def attack_sections(folder: Folder) -> list[Section]:
    return [Section("The set", folder.manifest.get("notes") or [], counts_table(folder)), attacked_section(folder.path, None)]
