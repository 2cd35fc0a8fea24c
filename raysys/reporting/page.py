"""What a page is made of, and how the pages' sections read and write numbers.

In and out: plain data; ``page.html.j2`` renders it and escapes every text. Leaves the choice of sections to
:mod:`raysys.reporting.html` and :mod:`raysys.reporting.sweep_page`.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from raysys.reporting.plots import Plot
from raysys.storage import read_bytes


@dataclass
class Region:
    points: str
    """Corners as "x,y x,y ..." in fractions of width and height: SVG's polygon in a viewBox of 0 0 1 1."""
    label: str


@dataclass
class Picture:
    src: str
    """``data:`` URI; empty where the picture could not be read, then a line says why."""
    lines: list[str]
    regions: list[Region] = field(default_factory=list)


@dataclass
class Table:
    head: list[str]
    rows: list[list[Any]]
    marked: set[int] = field(default_factory=set)
    """Rows to show in bold."""
    folded: str = ""
    """What stands for the table until it is opened; empty: it is open."""


@dataclass
class Section:
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    groups: list[tuple[str, list[Picture]]] = field(default_factory=list)
    slider: list[tuple[str, int, str]] = field(default_factory=list)
    """(threshold, number kept, share kept) for each stop."""
    text: str = ""


@dataclass
class Folder:
    path: str
    verb: str
    settings: dict[str, Any]
    manifest: dict[str, Any]
    """Empty while the work is not finished."""

    @property
    def counts(self) -> dict[str, Any]:
        return self.manifest.get("counts", {})


def read_parquet(path: str) -> list[dict[str, Any]]:
    return pq.read_table(io.BytesIO(read_bytes(path))).to_pylist()


def in_brackets(low: float, high: float) -> str:
    """An interval that stays on one line of a cell."""
    return f"[{100 * low:.2f},\u00a0{100 * high:.2f}]"
