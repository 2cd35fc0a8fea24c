"""The pages of annotations and of a selection: what was seen, what each threshold would keep, and the pictures.

In: A, or S with its A. Out: sections. They look at a sample of the rows (:mod:`raysys.regions.gallery`) and judge it by the policies themselves
(:mod:`raysys.policy.thresholds`); the counts of the whole corpus are the manifests'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raysys.config import PolicyConfig, choices, config_dir
from raysys.console import Progress
from raysys.errors import UserError
from raysys.masking import resolved
from raysys.policy.policy import judge
from raysys.policy.thresholds import STOPS, Scan, borderline, scan, written
from raysys.regions.gallery import groups_of_annotations, most_pictures, read_sample, show_rows
from raysys.reporting import plots
from raysys.reporting.page import (
    Folder,
    Picture,
    Region,
    Section,
    Slider,
    Table,
    Verbatim,
    counts_table,
    load_folder,
    not_shown,
    shares,
    thumbnail,
)
from raysys.storage import exists, join, read_bytes

SLIDER_PICTURES = 18
"""Pictures beside a threshold; six of them are shown at a time."""
OF_NONE = ("max_regions", "max_caption_overlap")
"""Thresholds that decide nothing beside the paper's rule: they are shown on the policy ``none``."""
OF_READINGS = ("min_text_score", "min_text_chars", "max_caption_overlap")
"""Thresholds that ask what was read."""


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
    stored = _Stored(folder.settings.get("ocr", {}))
    policies = {name: stored.asked_of(named_policy(name)) for name in choices("policy")}
    kept = {name: pc.sum(judge(table, policy)["keep"]).as_py() for name, policy in policies.items()}
    of_rows = f"kept of the {table.num_rows:,} rows looked at" if note else "kept"
    numbers.tables.append(Table(["policy", of_rows, "share"], shares(kept, table.num_rows)))
    numbers.notes += stored.notes
    scans = [scan(table, policies["none" if key in OF_NONE else "paper"], key, at_least=stored.least(key)) for key in stored.keys]
    pictures = _Pictures(table, folder.settings.get("corpus", {}).get("roots", {}))
    thresholds = _thresholds(table, scans, pictures, total or table.num_rows)
    thresholds.notes.insert(
        0,
        "Each threshold moves alone: those of regions and of their area from the policy paper, the last two from none (keep all).",
    )
    groups = [
        (title, [pictures.of(row) for row in rows[: most_pictures(table)]]) for title, rows in groups_of_annotations(table).items()
    ]
    pictures.read()
    return [numbers, thresholds, Section("Pictures", groups=groups), without]


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
    policy, stored = PolicyConfig(**folder.settings.get("policy", {})), _Stored(settings.get("ocr", {}))
    scans = [scan(table, policy, key, at_least=stored.least(key)) for key in stored.keys]
    shown = _Pictures(table, settings.get("corpus", {}).get("roots", {}))
    thresholds = _thresholds(table, scans, shown, total or table.num_rows)
    thresholds.notes.insert(
        0, f"Each threshold moves alone; everything else is as the policy {policy.name} of this selection has it."
    )
    near = borderline(scans, table.num_rows)
    verdicts = judge(table, policy)
    reason_of = pc.fill_null(verdicts["reason"], "kept").to_numpy(zero_copy_only=False)
    names, numbers = np.unique(reason_of, return_counts=True)
    for name in sorted(names, key=lambda name: (name != "kept", -numbers[names == name][0])):
        rows = np.flatnonzero(reason_of == name)
        rows = rows[np.argsort(near.margin[rows], kind="stable")]
        pictures.groups.append((name, [shown.of(row, near.change[row]) for row in rows[: most_pictures(table)]]))
    shown.read()
    pictures.notes.append(
        "Borderline: one threshold has to move the least for the other verdict; which one, and to where, stands below the picture."
    )
    return [counts, thresholds, pictures]


def _sample(annotations: str, total: int) -> tuple[pa.Table, list[str]]:
    """Rows of annotations, and what to say of those that were left out. :raises UserError: where there are none."""
    if not annotations:
        raise UserError("the settings name no annotations")
    table, rows_read, num_shards = read_sample(join(annotations, "shards"))
    if not table.num_rows:
        raise UserError("the annotations hold no rows")
    if table.num_rows == max(total, rows_read):
        return table, []
    return table, [
        f"Plots, thresholds and pictures look at {table.num_rows:,} rows from shards all over the {num_shards:,}; tables of samples are of all."
    ]


@dataclass
class _Stored:
    """What annotations can be asked, by their settings."""

    ocr: dict[str, Any]

    @property
    def read(self) -> bool:
        return bool(self.ocr.get("recognize", True))

    @property
    def store_score(self) -> float:
        return float(self.ocr.get("store_score", 0.0))

    @property
    def keys(self) -> list[str]:
        """Thresholds that decide by what is there."""
        return [key for key in STOPS if self.read or key not in OF_READINGS]

    def least(self, key: str) -> float:
        """The smallest value that a policy may ask: fainter boxes were not stored."""
        return self.store_score if key == "min_score" else 0.0

    def asked_of(self, policy: PolicyConfig) -> PolicyConfig:
        """The policy, as far as `raysys filter` takes it for these annotations."""
        policy = replace(policy, min_score=max(policy.min_score, self.store_score))
        return policy if self.read else replace(policy, min_text_score=0.0, min_text_chars=0, max_caption_overlap=1.0)

    @property
    def notes(self) -> list[str]:
        notes = []
        if not self.read:
            notes.append(
                "Nothing was read (ocr.recognize=false): every policy is shown with min_text_score=0, min_text_chars=0, max_caption_overlap=1."
            )
        if self.store_score > PolicyConfig().min_score:
            notes.append(
                f"Boxes below ocr.store_score={self.store_score:g} were not stored: every policy is shown with at least that min_score."
            )
        return notes


def _changed(selection: Folder, annotations: str) -> bool:
    """Whether the annotations are others than those that were judged."""
    then, file = selection.manifest.get("annotations_sha256"), join(annotations, "manifest.json")
    return then is not None and exists(file) and hashlib.sha256(read_bytes(file)).hexdigest() != then


def named_policy(name: str) -> PolicyConfig:
    return PolicyConfig(**yaml.safe_load(read_bytes(join(config_dir(), "policy", f"{name}.yaml"))))


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


def _thresholds(table: pa.Table, scans: Sequence[Scan], pictures: _Pictures, total: int) -> Section:
    """A slider for each threshold that decides something here."""
    section = Section("What each threshold would keep")
    idle = [one.key for one in scans if not one.decides]
    if idle:
        section.notes.append(f"Here these change nothing, whatever their value: {', '.join(idle)}.")
    section.sliders = [_slider(table, one, pictures, total) for one in scans if one.decides]
    return section


def _slider(table: pa.Table, one: Scan, pictures: _Pictures, total: int) -> Slider:
    kept = one.keep.sum(axis=1)
    x = [float(stop) if stop is not None else len(one.stops) - 1.0 for stop in one.stops]
    last = "any" if one.stops[-1] is None else ""
    curve, places = plots.curve(f"policy.{one.key}", x, (kept / table.num_rows).tolist(), own=one.own, last=last)
    stops = []
    for stop, number, place in zip(one.stops, kept.tolist(), places, strict=True):
        share = number / table.num_rows
        of_all = f"{number:,}" if table.num_rows == total else f"about {float(f'{share * total:.3g}'):,.0f}"
        stops.append((written(stop), f"{of_all} of {total:,} samples kept, {share:.1%}", round(place, 2)))
    flips = one.flips()
    rows = np.flatnonzero(np.isfinite(flips))
    rows = rows[np.argsort(flips[rows], kind="stable")]
    most = most_pictures(table, SLIDER_PICTURES)
    rows = rows[np.linspace(0, len(rows) - 1, min(most, len(rows))).round().astype(int)]
    near = [(pictures.of(row), int(flips[row]), bool(one.keep[0, row])) for row in rows]
    return Slider(f"policy.{one.key}", stops, one.own, curve, near)


class _Pictures:
    """Pictures of rows: first all are asked for, then each is read once, several beside each other."""

    def __init__(self, table: pa.Table, roots: dict[str, str]) -> None:
        self._table, self._roots = table, roots
        self._asked: dict[int, list[Picture]] = {}

    def of(self, number: int, change: str = "") -> Picture:
        """A row with its caption and regions; its picture comes with :meth:`read`.

        :param change: with which the verdict would be the other one.
        """
        row = self._table.slice(int(number), 1).to_pylist()[0]
        regions = []
        for region in row["regions"] or []:
            corners = zip(region["polygon"][::2], region["polygon"][1::2], strict=True)
            text = f"“{region['text']}” {region['text_score'] or 0:.2f}" if region["text"] else "nothing read"
            label = Verbatim(f"{text}, box {region['score']:.2f}, {region['area']:.1%}")
            regions.append(Region(" ".join(f"{x:.4f},{y:.4f}" for x, y in corners), label))
        caption = (row["caption"] or ["(no caption)"])[0]
        found = row["error"] or (f"regions cover {row['text_area']:.1%}" if regions else "no region")
        lines = [
            Verbatim(caption),
            Verbatim(f"{row['key']} · {found}"),
            *([f"the other verdict at policy.{change}"] if change else []),
        ]
        picture = Picture("", lines, regions)
        self._asked.setdefault(int(number), []).append(picture)
        return picture

    def read(self) -> None:
        """Fill in all that were asked for."""
        numbers = sorted(self._asked)
        rows = self._table.take(pa.array(numbers, pa.int64())).to_pylist()
        with Progress("report", len(rows), "pictures") as progress:

            def draw(row: dict[str, Any], data: bytes) -> str:
                progress.advance()
                return thumbnail(data)

            shown = show_rows(rows, self._roots, draw)
        for number, drawn in zip(numbers, shown, strict=True):
            for picture in self._asked[number]:
                if isinstance(drawn, Exception):
                    picture.lines.append(not_shown(drawn))
                    picture.regions.clear()
                else:
                    picture.src = drawn
