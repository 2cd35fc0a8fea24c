"""``raysys report PATH``: one self-contained page about any output folder.

In: a folder that a verb wrote (told by settings.json's "verb"). Out: PATH/report.html. The module reads as it works: load the
folder, turn it into sections (one function a verb, the demo composes the others'), render page.html.j2 with autoescape on.
Nothing on the page asks for anything outside it; a missing optional file is said in its section. Leaves plots to
:mod:`raysys.reporting.plots`, and a sweep's sections to :mod:`raysys.reporting.sweep_page`.
"""

from __future__ import annotations

import base64
import io
import json
import os
import secrets
from collections.abc import Callable, Iterable
from typing import Any

import jinja2
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml
from PIL import Image

from raysys.config import ClassSetConfig, PolicyConfig, ReportConfig, choices, config_dir
from raysys.corpus.images import decode
from raysys.corpus.shards import read_image, shard_path
from raysys.errors import UserError
from raysys.evaluation.metrics import PRIMARY
from raysys.masking import mask, resolved
from raysys.policy.policy import judge
from raysys.reporting import plots
from raysys.reporting.page import Folder, Picture, Region, Section, Table, in_brackets, read_parquet
from raysys.reporting.sweep_page import sweep_sections
from raysys.storage import absolute, exists, identity, join, list_files, open_fs, read_bytes, read_json, write_bytes
from raysys.training.metrics import read_metrics

MAX_ROWS = 20_000
"""Rows of annotations that a page looks at; the counts of the manifest are of all."""
MAX_PICTURES = 12
"""Pictures of a group."""
PICTURE_PX = 320
"""Long side of a picture on the page."""
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


# ---- load -------------------------------------------------------------------------------------------------------------


def load_folder(path: str) -> Folder:
    """:raises UserError: where the folder is missing or no verb of raysys wrote it."""
    if not exists(join(path, "settings.json")):
        raise UserError(f"{mask(path)}: not a folder of raysys (no settings.json there); give the output of a verb")
    settings = read_json(join(path, "settings.json"))
    verb = settings.get("verb") if isinstance(settings, dict) else None
    if verb not in SECTIONS:
        raise UserError(
            f"{mask(path)}: settings.json names no verb of raysys (verb={verb}); give the output of {', '.join(SECTIONS)}"
        )
    manifest = read_json(join(path, "manifest.json")) if exists(join(path, "manifest.json")) else {}
    return Folder(path, verb, settings.get("settings") or {}, manifest)


def read_rows(folder: str, columns: list[str]) -> tuple[pa.Table | None, str]:
    """The first MAX_ROWS rows of a folder of Parquet files, and a note on what was left out; None where there are none.

    A column ``identity`` is added: size and time of the shard that a row was made of.
    """
    try:
        root, names = list_files(folder, ".parquet")
    except UserError as error:
        return None, f"Nothing to show: {error}."
    batches: list[pa.RecordBatch] = []
    read = 0
    for name in names:
        fs, inner = open_fs(join(root, name))
        with fs.open(inner) as file:
            parquet = pq.ParquetFile(file)
            made_of = (parquet.metadata.metadata or {}).get(b"raysys.identity", b"").decode()
            for batch in parquet.iter_batches(columns=columns):
                batch = batch.slice(0, MAX_ROWS - read)
                batches.append(batch.append_column("identity", pa.array([made_of] * batch.num_rows)))
                read += batches[-1].num_rows
                if read == MAX_ROWS:
                    return pa.Table.from_batches(batches), f"Pictures and plots look at the first {MAX_ROWS:,} rows only."
    return (pa.Table.from_batches(batches), "") if read else (None, "Nothing to show: the files hold no rows.")


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


def picture(data: Callable[[], bytes], lines: list[str], regions: Iterable[Region] = ()) -> Picture:
    """A small JPEG as a data: URI; where it cannot be read, a line says why."""
    try:
        image = Image.fromarray(decode(data(), min_side_px=PICTURE_PX).pixels)
    except (OSError, ValueError) as error:
        return Picture("", [*lines, f"(picture not shown: {mask(str(error))})"])
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=80)
    return Picture("data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode(), lines, list(regions))


def sample_picture(row: dict[str, Any], roots: dict[str, str]) -> Picture:
    """A row of annotations with its caption and regions, read from the original shard at (offset, size)."""
    regions = []
    for region in row["regions"] or []:
        corners = list(zip(region["polygon"][::2], region["polygon"][1::2], strict=True))
        text = f"“{region['text']}” {region['text_score'] or 0:.2f}" if region["text"] else "nothing read"
        label = f"{text}, box {region['score']:.2f}, {region['area']:.1%}"
        regions.append(Region(" ".join(f"{x:.4f},{y:.4f}" for x, y in corners), label))

    def data() -> bytes:
        shard = shard_path(resolved(roots), row["shard"])
        if row["identity"] and row["identity"] != identity(shard):
            raise ValueError("its shard has changed since it was annotated")
        if shard.endswith(".tar") and row["offset"] < 0:
            raise ValueError("there is none")
        return read_image(shard, index=row["index"], offset=row["offset"], size=row["size"])

    captions = row["caption"] or ["(no caption)"]
    found = row["error"] or (f"regions cover {row['text_area']:.1%}" if regions else "no region")
    return picture(data, [captions[0], f"{row['key']} · {found}"], regions)


# ---- sections ---------------------------------------------------------------------------------------------------------

ANNOTATION_COLUMNS = ["shard", "index", "key", "offset", "size", "caption", "regions", "text_area", "error"]


def counts_table(folder: Folder) -> list[Table]:
    """The manifest's plain counts; none while the work is not finished."""
    rows = [[k.replace("_", " "), v] for k, v in folder.counts.items() if not isinstance(v, dict)]
    return [Table(["", "number"], rows)] if rows else []


def shares(counts: dict[str, int], total: int) -> list[list[Any]]:
    """Rows of name, count and share, the largest first."""
    return [[name, n, f"{n / max(total, 1):.1%}"] for name, n in sorted(counts.items(), key=lambda item: -item[1])]


def named_policy(name: str) -> PolicyConfig:
    return PolicyConfig(**yaml.safe_load(read_bytes(join(config_dir(), "policy", f"{name}.yaml"))))


def annotate_sections(folder: Folder) -> list[Section]:
    table, note = read_rows(join(folder.path, "shards"), ANNOTATION_COLUMNS)
    counts = folder.counts
    total = counts.get("samples", 0)
    numbers = Section("What was seen", [note] if note else [], counts_table(folder))
    errors = counts.get("errors") or {}
    errors_section = Section("Samples without a look", [] if errors else ["None: every picture was looked at."] if total else [])
    errors_section.notes += [f"Damaged shard {name}: {why}" for name, why in (counts.get("damaged_shards") or {}).items()]
    errors_section.tables += [Table(["reason", "samples", "share"], shares(errors, total))] if errors else []
    if table is None:
        return [numbers, errors_section]
    seen = table.filter(pc.is_null(table["error"]))
    area = np.asarray(seen["text_area"].to_numpy(), dtype=float)
    regions = seen["regions"].combine_chunks().flatten()
    scores = {"box": regions.field("score"), "text": regions.field("text_score")}
    numbers.plots = [
        plots.histogram(
            "Text area of the pictures that have text", "share of the picture", {"text area": area[area > 0]}, share=True
        ),
        plots.histogram(
            "Scores of the regions", "score", {k: v.drop_null().to_numpy(zero_copy_only=False) for k, v in scores.items()}
        ),
    ]
    by_policy = {name: judge(table, named_policy(name))["keep"] for name in choices("policy")}
    numbers.tables.append(
        Table(["policy", "kept", "share"], shares({k: pc.sum(keep).as_py() for k, keep in by_policy.items()}, table.num_rows))
    )
    stops = np.linspace(0, 1, 51) ** 2  # finer where it matters: most text is small
    kept = [pc.sum(judge(table, PolicyConfig(max_text_area=float(stop)))["keep"]).as_py() for stop in stops]
    rates = [n / table.num_rows for n in kept]
    threshold = Section(
        "Share kept for each policy.max_text_area",
        ["Everything else in the policy is at its default."],
        plots=[plots.lines("Share kept", "policy.max_text_area", {"kept": (stops.tolist(), rates)}, share=True)],
        slider=[(f"{stop:.2%}", n, f"{rate:.1%}") for stop, n, rate in zip(stops, kept, rates, strict=True)],
    )
    order = np.argsort(area, kind="stable")
    with_text, without = order[area[order] > 0], order[area[order] == 0]
    chosen = {
        "With text, the least first": with_text[:MAX_PICTURES],
        "With text, the most first": with_text[MAX_PICTURES:][::-1][:MAX_PICTURES],
        "Without text": without[np.linspace(0, len(without) - 1, min(MAX_PICTURES, len(without))).astype(int)],
    }
    roots = folder.settings.get("corpus", {}).get("roots", {})
    seen_pictures = Section("Pictures", groups=[
        (title, [sample_picture(row, roots) for row in seen.take(rows).to_pylist()]) for title, rows in chosen.items() if len(rows)
    ])  # fmt: skip
    return [numbers, threshold, seen_pictures, errors_section]


def filter_sections(folder: Folder, annotations: str | None = None) -> list[Section]:
    """:param annotations: where the annotations lie now; None takes the path of the settings."""
    kept, total = folder.counts.get("kept", 0), folder.counts.get("samples", 0)
    reasons = {"kept": kept, **{k: v for k, v in (folder.counts.get("reasons") or {}).items() if k != "kept"}}
    counts = Section(f"Kept {kept:,} of {total:,}" if total else "Kept and dropped")
    if total:
        counts.tables = [Table(["reason", "samples", "share"], shares(reasons, total))]
        counts.plots = [plots.bars("Samples by reason", reasons)]
    selection, note = read_rows(join(folder.path, "selection"), ["shard", "index", "keep", "reason"])
    source = annotations or resolved(folder.settings.get("annotations")) or ""
    seen, seen_note = read_rows(join(source, "shards"), ANNOTATION_COLUMNS)
    pictures = Section("Kept and dropped pictures, borderline ones first", [n for n in dict.fromkeys((note, seen_note)) if n])
    if selection is None or seen is None:
        return [counts, pictures]
    roots = load_folder(source).settings.get("corpus", {}).get("roots", {})
    row_of = {where: i for i, where in enumerate(zip(seen["shard"].to_pylist(), seen["index"].to_pylist(), strict=True))}
    area = np.nan_to_num(seen["text_area"].to_numpy().astype(float))
    by_reason: dict[str, list[int]] = {}
    for verdict in selection.to_pylist():
        row = row_of.get((verdict["shard"], verdict["index"]))
        if row is not None:
            by_reason.setdefault("kept" if verdict["keep"] else verdict["reason"] or "dropped", []).append(row)
    for reason, rows in sorted(by_reason.items(), key=lambda item: (item[0] != "kept", -len(item[1]))):
        # borderline: kept although there is much text, dropped although there is little
        nearest = sorted(rows, key=lambda row: -area[row] if reason == "kept" else area[row])[:MAX_PICTURES]
        pictures.groups.append((reason, [sample_picture(row, roots) for row in seen.take(nearest).to_pylist()]))
    return [counts, pictures]


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
    section.plots = [plots.lines(metric.replace("_", " "), "step", series) for metric, series in metrics.items()]
    return section


def train_sections(folder: Folder) -> list[Section]:
    return [Section("The run", tables=counts_table(folder)), training_section({"run": folder.path})]


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
    print(f"result: {report(cfg.path)}")
