"""Evidence -> verdict: which samples are kept, and why the others are not.

In: the columns of annotations (``caption``, ``regions``, ``text_area``, ``error``). Out: ``keep`` and ``reason`` for every row.
One pure function over Arrow columns, batch by batch. Geometry and words are asked only for rows whose verdict depends on them.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rapidfuzz.distance import Levenshtein

from raysys.config import PolicyConfig
from raysys.regions.geometry import union_areas

COLUMNS = ("caption", "regions", "text_area", "error")
VERDICT = pa.schema([("keep", pa.bool_()), ("reason", pa.string())])

TEXT_REGIONS = "too_many_regions"
TEXT_AREA = "text_area"
CAPTION_OVERLAP = "caption_overlap"
NO_CAPTION = "no_caption"

_BATCH_ROWS = 1 << 16
"""Rows decided at a time: their intermediate columns fit the caches, and those of a large table are never copied whole."""


def judge(table: pa.Table, policy: PolicyConfig) -> pa.Table:
    """Keep or drop every row.

    :param table: rows with ``COLUMNS``, in any chunks.
    :returns: a table of the same length: ``keep`` (bool) and ``reason`` (string, null where kept). A row with an error is dropped for
        that error; else without a caption (nothing to train on) for ``no_caption``; else the first of too_many_regions, text_area,
        caption_overlap that holds.
    """
    batches = table.select(COLUMNS).to_batches(max_chunksize=_BATCH_ROWS)
    return pa.Table.from_batches([_judge(batch, policy) for batch in batches], schema=VERDICT)


def _judge(batch: pa.RecordBatch, policy: PolicyConfig) -> pa.RecordBatch:
    caption, regions, text_area, error = (batch[column] for column in COLUMNS)
    counting = _Counting(regions, policy)
    broken = _numpy(pc.is_valid(error))
    captionless = _lengths(caption) == 0
    crowded = np.full(len(batch), False) if policy.max_regions is None else counting.per_row > policy.max_regions
    covered = _covers_more_than(policy.max_text_area, text_area, counting)
    repeated = np.full(len(batch), False)
    if policy.max_caption_overlap < 1:
        rows = np.flatnonzero((counting.per_row > 0) & ~(broken | captionless | crowded | covered))
        repeated[rows] = _repeated(_take(caption, rows), _take(counting.texts(), rows), policy.max_caption_overlap)
    reason = pc.case_when(
        pc.make_struct(*map(pa.array, (broken, captionless, crowded, covered, repeated))),
        *(error, NO_CAPTION, TEXT_REGIONS, TEXT_AREA, CAPTION_OVERLAP),
    )
    return pa.record_batch([pc.is_null(reason), reason], schema=VERDICT)


class _Counting:
    """The regions that count, N of a batch."""

    def __init__(self, regions: pa.ListArray, policy: PolicyConfig) -> None:
        self.stored_per_row = _lengths(regions)
        flat = regions.flatten()  # without what lies beneath null lists
        columns = (pc.struct_field(flat, name) for name in ("polygon", "score", "area", "text", "text_score"))
        polygon, score, area, text, text_score = columns
        there = _numpy(pc.is_valid(polygon))
        found = np.flatnonzero(there & (_floats(score) >= policy.min_score) & (_floats(text_score) >= policy.min_text_score))
        text = pc.fill_null(text, "")
        letters = pc.utf8_length(pc.replace_substring_regex(_take(text, found), r"[^\p{L}\p{N}]", ""))
        found = found[_numpy(letters) >= policy.min_text_chars]
        if policy.min_height_frac > 0:
            found = found[np.ptp(_corners(polygon, found)[:, :, 1], axis=1) >= policy.min_height_frac]
        self.row = np.repeat(np.arange(len(regions)), self.stored_per_row)[found]
        """int64 [N], ascending: whose region each is."""
        self.per_row = np.bincount(self.row, minlength=len(regions))
        """int64 [rows]: how many regions count."""
        self.area = _floats(area)[found]
        self._found, self._polygon, self._text = found, polygon, text

    def polygons(self, which: np.ndarray) -> np.ndarray:
        """[n, 4, 2] of some of them."""
        return _corners(self._polygon, self._found[which])

    def texts(self) -> pa.ListArray:
        """Row by row, what stands in them."""
        first = np.concatenate([[0], np.cumsum(self.per_row)])
        return pa.ListArray.from_arrays(pa.array(first, pa.int32()), _take(self._text, self._found))


def _numpy(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)


def _take(column: pa.Array, which: np.ndarray) -> pa.Array:
    return column.take(pa.array(which))


def _floats(column: pa.Array) -> np.ndarray:
    """Nulls become 0: what was not read scores nothing."""
    return _numpy(pc.fill_null(column, 0.0))


def _lengths(lists: pa.ListArray) -> np.ndarray:
    """A null list is empty."""
    return _numpy(pc.fill_null(pc.list_value_length(lists), 0))


def _corners(polygon: pa.FixedSizeListArray, which: np.ndarray) -> np.ndarray:
    return _numpy(_take(polygon, which).flatten()).reshape(-1, 4, 2)


def _covers_more_than(limit: float, text_area: pa.Array, counting: _Counting) -> np.ndarray:
    """bool [rows]: do the counting regions together cover more of the picture than the limit?

    The stored union answers where all regions count; else sum and maximum bound it (detectors cut boxes at the picture's edge), and
    geometry is asked only in between. Areas compare as float32, which they are stored as.
    """
    num_rows = len(text_area)
    if limit >= 1:
        return np.full(num_rows, False)
    if limit == 0:
        return counting.per_row > 0  # the paper's rule: any region, however small
    largest = np.zeros(num_rows, np.float32)
    np.maximum.at(largest, counting.row, counting.area)
    total = np.bincount(counting.row, counting.area, num_rows).astype(np.float32)
    stored = (counting.per_row == counting.stored_per_row) & _numpy(pc.is_valid(text_area))
    over = np.where(stored, _floats(text_area), largest) > limit
    unsure = ~stored & ~over & (total > limit)
    which = np.flatnonzero(unsure[counting.row])
    union = union_areas(counting.polygons(which), counting.row[which], num_rows).astype(np.float32)
    return (over | (union > limit)) & (counting.per_row > 0)


_LETTERS_PER_EDIT = 4
"""One letter of so many may be misread; shorter words must match to the letter."""
_WORD = re.compile(r"\w+")


def words_of(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def caption_overlap(captions: list[str], texts: list[str]) -> float:
    """Share of a caption's words that stand in the recognised text (0..1), the largest over the captions.

    A word stands there when a recognised word is within an edit distance of a quarter of its length (OCR misreads letters), or when
    it has 4 letters or more and occurs in a line read without its spaces.
    """
    lines = [words_of(text) for text in texts]
    read = {word for line in lines for word in line}
    letters = "\n".join(["".join(line) for line in lines])
    largest = 0.0
    for caption in captions:
        words = words_of(caption)
        found = [w for w in words if w in read or (len(w) >= _LETTERS_PER_EDIT and _stands_misread(w, read, letters))]
        largest = max(largest, len(found) / max(len(words), 1))
    return largest


def _stands_misread(word: str, read: set[str], letters: str) -> bool:
    """:param letters: all lines, each without its spaces."""
    edits = len(word) // _LETTERS_PER_EDIT
    # Of edits + 1 pieces of a word, that many edits leave one as it was: where no piece stands, no word is near. Most end here.
    size = len(word) // (edits + 1)
    for start in range(0, size * (edits + 1), size):
        if word[start : start + size] in letters:
            return word in letters or any(Levenshtein.distance(word, near, score_cutoff=edits) <= edits for near in read)
    return False


def _repeated(captions: pa.ListArray, texts: pa.ListArray, limit: float) -> np.ndarray:
    """bool [rows]: is the :func:`caption_overlap` larger than the limit?"""
    repeated = _may_repeat(captions, texts, limit)
    rows = np.flatnonzero(repeated)
    pairs = zip(_strings(_take(captions, rows)), _strings(_take(texts, rows)), strict=True)
    repeated[rows] = [caption_overlap(*pair) > limit for pair in pairs]
    return repeated


def _strings(lists: pa.ListArray) -> Iterator[list[str]]:
    """As Python's lists. (``to_pylist`` of nested columns takes seven times as long.)"""
    strings = pc.fill_null(lists.flatten(), "").to_pylist()
    ends = np.cumsum(_lengths(lists)).tolist()
    return (strings[first:end] for first, end in itertools.pairwise([0, *ends]))


def _may_repeat(captions: pa.ListArray, texts: pa.ListArray, limit: float) -> np.ndarray:
    """bool [rows]: False where pairs of neighbouring letters rule :func:`_repeated` out, five times as fast as looking at words.

    An edit spoils two of a word's pairs at most; all others stand in the text. Rows that are not ASCII stay: there, case-folding
    changes more than the size of letters.
    """
    lines = pc.binary_join(texts, " ")
    letters, row = _letters(lines)
    letters, row = letters[letters > 0], row[letters > 0]  # lines are also read without their spaces
    in_text = np.zeros((len(lines), 256), dtype=bool)
    in_text[row, _pairs(letters)] = True

    flat, owner = pc.fill_null(captions.flatten(), ""), np.repeat(np.arange(len(captions)), _lengths(captions))
    letters, caption = _letters(flat)
    edges = np.diff((letters > 0).astype(np.int8), prepend=0)
    begin, end = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)  # of words
    missing = np.concatenate([[0], np.cumsum(~in_text[owner[caption], _pairs(letters)])])
    possible = missing[end - 1] - missing[begin] <= 2 * ((end - begin) // _LETTERS_PER_EDIT)
    share = np.bincount(caption[begin], possible, len(flat)) / np.maximum(np.bincount(caption[begin], minlength=len(flat)), 1)
    maybe = (share > limit) | ~_numpy(pc.string_is_ascii(flat))
    return (np.bincount(owner, maybe, len(captions)) > 0) | ~_numpy(pc.string_is_ascii(lines))


# Byte -> small letter or digit, 0 for what stands between words: what words_of sees in ASCII.
_LETTER = np.array([ord(c.lower()) if c.isascii() and _WORD.match(c) else 0 for c in map(chr, range(256))], np.uint8)


def _letters(strings: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [bytes] of all strings, with a space after each; and int64 [bytes]: which string each is of."""
    spaced = pc.binary_join_element_wise(strings, "", " ")
    _, offsets, data = spaced.buffers()
    first = np.frombuffer(offsets, np.int32)[: len(spaced) + 1]
    return _LETTER[np.frombuffer(data, np.uint8)[: first[-1]]], np.repeat(np.arange(len(spaced)), np.diff(first))


def _pairs(letters: np.ndarray) -> np.ndarray:
    """uint8 [bytes]: each letter and the next in one number; two pairs that share one only cost time."""
    return letters * np.uint8(31) + np.append(letters[1:], np.uint8(0))
