"""Evidence -> verdict: which samples are kept, and why the others are not.

In: the columns of annotations (``caption``, ``regions``, ``text_area``, ``error``). Out: ``keep`` and ``reason`` for every row.
One pure function over Arrow columns. The loop over words runs only for rows where the answer depends on it.
"""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz.distance import Levenshtein

from raysys.config import PolicyConfig
from raysys.regions.geometry import union_area

COLUMNS = ("caption", "regions", "text_area", "error")

TEXT_REGIONS = "too_many_regions"
TEXT_AREA = "text_area"
CAPTION_OVERLAP = "caption_overlap"
NO_CAPTION = "no_caption"


def judge(table: pa.Table, policy: PolicyConfig) -> pa.Table:
    """Keep or drop every row.

    :param table: rows with ``COLUMNS``.
    :returns: a table of the same length: ``keep`` (bool) and ``reason`` (string, null where kept). A row with an error is dropped for
        that error; else without a caption (nothing to train on) for ``no_caption``; else the first of too_many_regions, text_area,
        caption_overlap that holds.
    """
    regions = table["regions"].combine_chunks()
    counting = _Counting(regions, policy)
    reason = np.full(table.num_rows, None, dtype=object)

    if policy.max_caption_overlap < 1:
        for row in np.flatnonzero(counting.per_row):
            if caption_overlap(table["caption"][int(row)].as_py() or [], counting.texts(int(row))) > policy.max_caption_overlap:
                reason[row] = CAPTION_OVERLAP
    reason[_covers_more_than(policy.max_text_area, table["text_area"], counting)] = TEXT_AREA
    if policy.max_regions is not None:
        reason[counting.per_row > policy.max_regions] = TEXT_REGIONS
    captions = pc.fill_null(pc.list_value_length(table["caption"]), 0).to_numpy()
    reason[captions == 0] = NO_CAPTION
    errors = table["error"].to_numpy()
    broken = np.array([e is not None for e in errors], dtype=bool)
    reason[broken] = errors[broken]
    keep = np.array([r is None for r in reason], dtype=bool)
    return pa.table({"keep": pa.array(keep, pa.bool_()), "reason": pa.array(reason, pa.string())})


class _Counting:
    """The regions that count, row by row."""

    def __init__(self, regions: pa.ListArray, policy: PolicyConfig) -> None:
        lengths = regions.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        flat: pa.StructArray = regions.flatten()
        self.first = np.concatenate([[0], np.cumsum(lengths)])  # row r owns flat[first[r]:first[r + 1]]
        self._rows = np.repeat(np.arange(len(regions)), lengths)
        self._text = flat.field("text")
        self.polygons = _floats(flat.field("polygon").flatten()).reshape(-1, 4, 2)
        self.area = _floats(flat.field("area"))
        ys = self.polygons[:, :, 1]
        height = ys.max(1) - ys.min(1) if len(ys) else np.zeros(0)
        chars = pc.utf8_length(pc.replace_substring_regex(pc.fill_null(self._text, ""), r"[^\p{L}\p{N}]", ""))
        self.mask = (
            (_floats(flat.field("score")) >= policy.min_score)
            & (_floats(flat.field("text_score")) >= policy.min_text_score)
            & (chars.to_numpy(zero_copy_only=False) >= policy.min_text_chars)
            & (height >= policy.min_height_frac)
        )
        self.per_row = np.bincount(self._rows[self.mask], minlength=len(regions))
        """int64 [rows]: how many regions count."""
        self.all_count = self.per_row == lengths
        self.area_sum = np.bincount(self._rows[self.mask], self.area[self.mask], minlength=len(regions))
        self.area_max = np.zeros(len(regions))
        np.maximum.at(self.area_max, self._rows[self.mask], self.area[self.mask])

    def of_row(self, row: int) -> np.ndarray:
        """Indices of the row's counting regions in the flat columns."""
        first, end = self.first[row], self.first[row + 1]
        return first + np.flatnonzero(self.mask[first:end])

    def texts(self, row: int) -> list[str]:
        return [self._text[int(i)].as_py() or "" for i in self.of_row(row)]


def _floats(column: pa.Array) -> np.ndarray:
    """Nulls become 0: what was not read scores nothing."""
    return pc.fill_null(column, 0.0).to_numpy(zero_copy_only=False)


def _covers_more_than(limit: float, text_area: pa.ChunkedArray, counting: _Counting) -> np.ndarray:
    """bool [rows]: do the counting regions together cover more of the picture than the limit?

    The stored union answers where all regions count; else sum and maximum bound it, and geometry is asked only in between.
    """
    stored = pc.fill_null(text_area, 0.0).to_numpy()
    over = np.where(counting.all_count, stored > limit, counting.area_max > limit)
    if limit == 0:
        return counting.per_row > 0  # the paper's rule: any region, however small
    for row in np.flatnonzero(~counting.all_count & ~over & (counting.area_sum > limit)):
        over[row] = union_area(counting.polygons[counting.of_row(int(row))]) > limit
    return over & (counting.per_row > 0)


def words_of(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def caption_overlap(captions: list[str], texts: list[str]) -> float:
    """Share of a caption's words that stand in the recognised text (0..1), the largest over the captions.

    A word stands there when a recognised word is within an edit distance of a quarter of its length (OCR misreads letters), or when
    it has 4 letters or more and occurs in a line read without its spaces.
    """
    read = {word for text in texts for word in words_of(text)}
    lines = ["".join(words_of(text)) for text in texts]
    return max((_share_found(words_of(caption), read, lines) for caption in captions), default=0.0)


def _share_found(words: list[str], read: set[str], lines: list[str]) -> float:
    if not words:
        return 0.0
    return sum(_stands_in(word, read, lines) for word in words) / len(words)


def _stands_in(word: str, read: set[str], lines: list[str]) -> bool:
    if word in read:
        return True
    if len(word) >= 4:
        allowed = len(word) // 4
        return any(word in line for line in lines) or any(
            Levenshtein.distance(word, r, score_cutoff=allowed) <= allowed for r in read
        )
    return False
