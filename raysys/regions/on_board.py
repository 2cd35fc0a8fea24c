"""What ``raysys annotate`` shows in TensorBoard: shares, histograms, and pictures with their boxes.

In: an annotations folder. Out: A/tensorboard. Histograms and pictures are of a sample of rows from shards all over the corpus
(:mod:`raysys.regions.gallery`), so that this costs seconds at any size; shares are of all. :func:`draw_rows` serves filter too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raysys.board import PICTURE_PX, Board, draw_boxes, new_board
from raysys.console import say
from raysys.corpus.images import decode
from raysys.masking import mask
from raysys.regions.gallery import groups_of_annotations, most_pictures, read_sample, show_rows
from raysys.storage import join


def write_board(folder: str, roots: dict[str, str], counts: Mapping[str, Any]) -> None:
    """
    :param folder: A.
    :param roots: source -> where its shards lie.
    :param counts: of the manifest.
    """
    table, _, _ = read_sample(join(folder, "shards"))
    groups = {re.sub(r"\W+", "_", title).lower(): rows for title, rows in groups_of_annotations(table).items()}
    pictures = draw_rows("annotate", table, groups, roots)
    samples = counts["samples"]
    shares = {"with_regions": counts["with_regions"], "with_text": counts["with_text"], "error": sum(counts["errors"].values())}
    with new_board(join(folder, "tensorboard")) as board:
        board.scalars({f"data/{name}_share": number / samples for name, number in shares.items()}, 0)
        add_histograms(board, table)
        for group, drawn in pictures.items():
            board.pictures(f"regions/{group}", drawn, 0)


def add_histograms(board: Board, table: pa.Table) -> None:
    """``data/text_area`` of the samples with a region; ``data/box_score`` and, where text was read, ``data/text_score`` of the regions."""
    regions = table["regions"].combine_chunks().flatten()
    values = {
        "text_area": table["text_area"].filter(pc.greater(table["text_area"], 0)),
        "box_score": regions.field("score"),
        "text_score": regions.field("text_score").filter(pc.not_equal(pc.fill_null(regions.field("text"), ""), "")),
    }
    for name, column in values.items():
        if len(column.drop_null()):
            board.histogram(f"data/{name}", column.drop_null().to_numpy(), 0)


def draw_rows(verb: str, table: pa.Table, groups: Mapping[str, np.ndarray], roots: dict[str, str]) -> dict[str, list[np.ndarray]]:
    """Pictures of rows with their boxes, by group. One that cannot be shown is left out; one line says how many, and why the first.

    :param table: as :func:`read_sample` gives it. :param groups: numbers of rows, those first that matter most.
    :returns: only groups with pictures; uint8 RGB [h, w, 3] each.
    """
    most = most_pictures(table)
    owner = [(group, number) for group, rows in groups.items() for number in rows[:most].tolist()]
    shown = show_rows(table.take(pa.array([number for _, number in owner], pa.int64())).to_pylist(), roots, _draw)
    drawn: dict[str, list[np.ndarray]] = {}
    failures = []
    for (group, _), picture in zip(owner, shown, strict=True):
        if isinstance(picture, Exception):
            failures.append(mask(str(picture)))
        else:
            drawn.setdefault(group, []).append(picture)
    if failures:
        say(f"{verb}: {len(failures)} pictures are not shown in TensorBoard: {failures[0]}")
    return drawn


def _draw(row: dict[str, Any], data: bytes) -> np.ndarray:
    regions = row["regions"] or []
    polygons = np.array([region["polygon"] for region in regions], float).reshape(-1, 4, 2)
    labels = [f"{region['text'] or ''} ({region['score']:.2f})" for region in regions]
    notes = [f"boxes cover {row['text_area'] or 0:.1%}, key {row['key']}", "; ".join(row["caption"] or [])]
    return draw_boxes(decode(data, min_long_side_px=PICTURE_PX).pixels, polygons, labels, notes)
