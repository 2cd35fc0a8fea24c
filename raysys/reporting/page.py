"""What a page is made of, and how the pages' sections read folders, pictures and numbers.

In and out: plain data; ``page.html.j2`` renders it and escapes every text. Leaves the choice of sections to
:mod:`raysys.reporting.html` and the ``*_page`` modules.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from raysys.config import VERBS
from raysys.corpus.images import decode
from raysys.errors import UserError
from raysys.masking import mask
from raysys.reporting.plots import Plot
from raysys.storage import exists, join, read_bytes, read_json

PICTURE_PX = 320
"""Long side of a picture on the page."""


class Verbatim(str):
    """Text of the corpus: it is shown as it is (escaped, as every text), though it may look like a URL with a secret."""


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
class Slider:
    """A threshold that the reader moves."""

    key: str
    stops: list[tuple[str, str, float]]
    """(value, what it keeps, how far right the plot's cursor stands, in the plot's units) for each stop."""
    own: int
    """Stop at the start."""
    plot: Plot
    """Its element ``cursor`` stands at ``own``."""
    pictures: list[tuple[Picture, int, bool]]
    """Picture, stop from which on its verdict is the other one, whether it is kept before."""


@dataclass
class Section:
    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    groups: list[tuple[str, list[Picture]]] = field(default_factory=list)
    sliders: list[Slider] = field(default_factory=list)
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


def load_folder(path: str) -> Folder:
    """:raises UserError: where the folder is missing or no verb of raysys wrote it."""
    if not exists(join(path, "settings.json")):
        raise UserError(f"{mask(path)}: not a folder of raysys (no settings.json there); give the output of a verb")
    settings = read_json(join(path, "settings.json"))
    verb = settings.get("verb") if isinstance(settings, dict) else None
    if verb not in VERBS:
        raise UserError(f"{mask(path)}: settings.json names no verb of raysys (verb={verb}); give the output of a verb")
    manifest = read_json(join(path, "manifest.json")) if exists(join(path, "manifest.json")) else {}
    return Folder(path, verb, settings.get("settings") or {}, manifest)


def picture(data: Callable[[], bytes], lines: list[str]) -> Picture:
    """Where it cannot be read, a line says why."""
    try:
        return Picture(thumbnail(data()), lines)
    except (OSError, ValueError) as error:
        return Picture("", [*lines, not_shown(error)])


def thumbnail(data: bytes) -> str:
    """A small JPEG as a ``data:`` URI. :raises OSError, ValueError: where the bytes are no picture."""
    image = Image.fromarray(decode(data, min_side_px=PICTURE_PX).pixels)
    image.thumbnail((PICTURE_PX, PICTURE_PX))
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=75)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode()


def not_shown(why: Exception) -> str:
    return f"(picture not shown: {mask(str(why))})"


def counts_table(folder: Folder) -> list[Table]:
    """The manifest's plain counts; none while the work is not finished."""
    rows = [[k.replace("_", " "), v] for k, v in folder.counts.items() if not isinstance(v, dict)]
    return [Table(["", "number"], rows)] if rows else []


def shares(counts: dict[str, int], total: int) -> list[list[Any]]:
    """Rows of name, count and share, the largest first."""
    return [[name, n, f"{n / max(total, 1):.1%}"] for name, n in sorted(counts.items(), key=lambda item: -item[1])]
