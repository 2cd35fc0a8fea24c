"""The pages of annotations and of a selection: what was seen, what each threshold would keep, and the pictures.

In: A, or S with its A. Out: sections. They look at a sample of the rows (:mod:`raysys.regions.gallery`) and judge it by the policies themselves
(:mod:`raysys.policy.thresholds`); the counts of the whole corpus are the manifests'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raysys.config import PolicyConfig, choices, config_dir
from raysys.errors import UserError
from raysys.masking import resolved
from raysys.policy.policy import judge
from raysys.policy.thresholds import STOPS, Borderline, Scan, borderline, scan, written
from raysys.regions.gallery import MAX_PICTURES, groups_of_annotations, read_sample, sample_bytes
from raysys.reporting import plots
from raysys.reporting.page import Folder, Picture, Region, Section, Slider, Table, counts_table, load_folder, picture, shares
from raysys.storage import exists, join, read_bytes

SLIDER_PICTURES = 18
"""Pictures beside a threshold; six of them are shown at a time."""
SLIDER_PICTURE_PX = 240
OF_NONE = ("max_regions", "max_caption_overlap")
"""Thresholds that decide nothing beside the paper's rule: they are shown on the policy ``none``."""


def annotate_sections(folder: Folder) -> list[Section]:
    counts = folder.counts
    total = counts.get("samples", 0)
    numbers = Section("What was seen", tables=counts_table(folder))
    errors = counts.get("errors") or {}
    without = Section("Samples without a look", [] if errors else ["None: every picture was looked at."] if total else [])
    without.notes += [f"Damaged shard {name}: {why}" for name, why in (counts.get("damaged_shards") or {}).items()]
    without.tables += [Table(["reason", "samples", "share"], shares(errors, total))] if errors else []
    try:
        table, note = _sample(folder.path, total)
    except UserError as error:
        numbers.notes.append(f"Nothing to show: {error}.")
        return [numbers, without]
    numbers.notes += note
    numbers.plots = _distributions(table)
    by_policy = {name: pc.sum(judge(table, named_policy(name))["keep"]).as_py() for name in choices("policy")}
    numbers.tables.append(Table(["policy", "kept", "share"], shares(by_policy, table.num_rows)))
    store_score = folder.settings.get("ocr", {}).get("store_score", 0.0)
    bases = {key: named_policy("none" if key in OF_NONE else "paper") for key in STOPS}
    scans = [scan(table, policy, key, at_least=_least(key, store_score)) for key, policy in bases.items()]
    roots = folder.settings.get("corpus", {}).get("roots", {})
    thresholds = _thresholds(table, scans, roots, total or table.num_rows)
    thresholds.notes.insert(
        0,
        "Each threshold moves alone: those of regions and of their area from the policy paper, the last two from none (keep all).",
    )
    lines = {key: _lines(table, rows) for key, rows in groups_of_annotations(table).items()}
    pictures = Section("Pictures", groups=[
        (title, [sample_picture(row, roots, extra) for row, extra in lines[title]]) for title in lines
    ])  # fmt: skip
    return [numbers, thresholds, pictures, without]


def filter_sections(folder: Folder, annotations: str | None = None) -> list[Section]:
    """:param annotations: where the annotations lie now; None takes the path of the settings."""
    kept, total = folder.counts.get("kept", 0), folder.counts.get("samples", 0)
    reasons = {"kept": kept, **{k: v for k, v in (folder.counts.get("reasons") or {}).items() if k != "kept"}}
    counts = Section(f"Kept {kept:,} of {total:,}" if total else "Kept and dropped")
    if total:
        counts.tables = [Table(["reason", "samples", "share"], shares(reasons, total))]
        counts.plots = [plots.bars("Samples by reason", reasons)]
    pictures = Section("Kept and dropped pictures, borderline ones first")
    source = annotations or resolved(folder.settings.get("annotations")) or ""
    try:
        table, note = _sample(source, total)
        settings = load_folder(source).settings
    except UserError as error:
        pictures.notes.append(f"Nothing to show: {error}.")
        return [counts, pictures]
    counts.notes += note
    counts.plots += _distributions(table)
    if _changed(folder, source):
        counts.notes.append(
            "The annotations changed since this selection was made; the plots and pictures below are of what they are now."
        )
    policy = PolicyConfig(**folder.settings.get("policy", {}))
    store_score = settings.get("ocr", {}).get("store_score", 0.0)
    scans = [scan(table, policy, key, at_least=_least(key, store_score)) for key in STOPS]
    roots = settings.get("corpus", {}).get("roots", {})
    thresholds = _thresholds(table, scans, roots, total or table.num_rows)
    thresholds.notes.insert(
        0, f"Each threshold moves alone; everything else is as the policy {policy.name} of this selection has it."
    )
    near = borderline(scans, table.num_rows)
    verdicts = judge(table, policy)
    reason_of = pc.fill_null(verdicts["reason"], "kept").to_numpy(zero_copy_only=False)
    names, numbers = np.unique(reason_of, return_counts=True)
    for name in sorted(names, key=lambda name: (name != "kept", -numbers[names == name][0])):
        rows = np.flatnonzero(reason_of == name)
        rows = rows[np.argsort(near.margin[rows], kind="stable")][:MAX_PICTURES]
        pictures.groups.append((name, [sample_picture(row, roots, extra) for row, extra in _lines(table, rows, near)]))
    pictures.notes.append(
        "Borderline: one threshold has to move the least for the other verdict; which one, and to where, stands below the picture."
    )
    return [counts, thresholds, pictures]


def _sample(annotations: str, total: int) -> tuple[pa.Table, list[str]]:
    """Rows of annotations, and what to say of those that were left out. :raises UserError: where there are none."""
    if not annotations:
        raise UserError("the settings name no annotations")
    table, rows_read, names = read_sample(join(annotations, "shards"))
    if not table.num_rows:
        raise UserError("the annotations hold no rows")
    if table.num_rows == max(total, rows_read):
        return table, []
    return table, [
        f"Plots and pictures look at {table.num_rows:,} rows from shards all over the {len(names):,}; tables of counts are of all."
    ]


def _changed(selection: Folder, annotations: str) -> bool:
    """Whether the annotations are others than those that were judged."""
    then, file = selection.manifest.get("annotations_sha256"), join(annotations, "manifest.json")
    return then is not None and exists(file) and hashlib.sha256(read_bytes(file)).hexdigest() != then


def named_policy(name: str) -> PolicyConfig:
    return PolicyConfig(**yaml.safe_load(read_bytes(join(config_dir(), "policy", f"{name}.yaml"))))


def _least(key: str, store_score: float) -> float:
    """The smallest value that a policy may ask: fainter boxes were not stored."""
    return store_score if key == "min_score" else 0.0


def _distributions(table: pa.Table) -> list[plots.Plot]:
    area = table["text_area"].drop_null().to_numpy()
    regions = pc.list_flatten(table["regions"])
    scores = {"box": pc.struct_field(regions, "score"), "text": pc.struct_field(regions, "text_score")}
    return [
        plots.histogram(
            "Text area of the pictures that have text", "share of the picture", {"text area": area[area > 0]}, share=True
        ),
        plots.histogram("Scores of the regions", "score", {name: values.drop_null().to_numpy() for name, values in scores.items()}),
    ]


def _thresholds(table: pa.Table, scans: Sequence[Scan], roots: dict[str, str], total: int) -> Section:
    """A slider for each threshold that decides something here."""
    section = Section("What each threshold would keep")
    idle = [one.key for one in scans if not one.decides]
    if idle:
        section.notes.append(f"Here these change nothing, whatever their value: {', '.join(idle)}.")
    section.sliders = [_slider(table, one, roots, total) for one in scans if one.decides]
    return section


def _slider(table: pa.Table, one: Scan, roots: dict[str, str], total: int) -> Slider:
    kept = one.keep.sum(axis=1)
    shown = [written(stop) for stop in one.stops]
    x = [float(stop) if stop is not None else len(one.stops) - 1.0 for stop in one.stops]
    curve, places = plots.curve(
        f"policy.{one.key}", x, (kept / table.num_rows).tolist(), own=one.own, last="any" if one.stops[-1] is None else ""
    )
    stops = []
    for value, number, place in zip(shown, kept.tolist(), places, strict=True):
        share = number / table.num_rows
        of_all = (
            f"{number:,} of {table.num_rows:,} samples kept"
            if table.num_rows == total
            else f"about {float(f'{share * total:.3g}'):,.0f} of {total:,} samples kept"
        )
        stops.append((value, f"{of_all}, {share:.1%}", round(place, 2)))
    flips = one.flips()
    rows = np.flatnonzero(np.isfinite(flips))
    rows = rows[np.argsort(flips[rows], kind="stable")]
    rows = rows[np.linspace(0, len(rows) - 1, min(SLIDER_PICTURES, len(rows))).round().astype(int)]
    pictures = [
        (sample_picture(row, roots, extra, side_px=SLIDER_PICTURE_PX), int(flips[i]), bool(one.keep[0, i]))
        for i, (row, extra) in zip(rows, _lines(table, rows), strict=True)
    ]
    return Slider(f"policy.{one.key}", stops, one.own, curve, pictures)


def _lines(table: pa.Table, rows: np.ndarray, near: Borderline | None = None) -> list[tuple[dict[str, Any], list[str]]]:
    """Rows as plain values, and what is said of each beside its key."""
    changes = [near.change[row] for row in rows] if near else [""] * len(rows)
    said = [[f"the other verdict at policy.{change}"] if change else [] for change in changes]
    return list(zip(table.take(pa.array(rows)).to_pylist(), said, strict=True))


def sample_picture(row: dict[str, Any], roots: dict[str, str], lines: Sequence[str] = (), **how: Any) -> Picture:
    """A row of annotations with its caption and regions, read from the original shard."""
    regions = []
    for region in row["regions"] or []:
        corners = list(zip(region["polygon"][::2], region["polygon"][1::2], strict=True))
        text = f"“{region['text']}” {region['text_score'] or 0:.2f}" if region["text"] else "nothing read"
        label = f"{text}, box {region['score']:.2f}, {region['area']:.1%}"
        regions.append(Region(" ".join(f"{x:.4f},{y:.4f}" for x, y in corners), label))
    captions = row["caption"] or ["(no caption)"]
    found = row["error"] or (f"regions cover {row['text_area']:.1%}" if regions else "no region")
    return picture(lambda: sample_bytes(row, roots), [captions[0], f"{row['key']} · {found}", *lines], regions, **how)
