"""A folder of pictures with ``captions.csv`` or ``captions.jsonl``: the captions file is the shard, a picture's line(s) the sample.

A line names the picture (``IMAGE_FIELDS``, relative to the captions file) and its caption (``CAPTION_FIELDS``). Several lines in a row about the
same picture are several captions of one sample. The key is the picture's name without its suffix.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import os
from collections.abc import Iterator
from typing import BinaryIO

from raysys.corpus.samples import BAD_RECORD, UNSAFE_NAME, DamagedShard, Part, Sample, as_uid, clean_captions, is_unsafe, printable
from raysys.storage import join, named_errors, open_fs, reading

IMAGE_FIELDS = ("file_name", "image", "filename", "filepath", "path", "file")
CAPTION_FIELDS = ("captions", "caption", "text", "title", "txt")
csv.field_size_limit(1 << 24)  # a caption may be longer than the module's 128 KB; one that is not closed must not eat the file


def iter_samples(path: str, part: Part | None) -> Iterator[Sample]:
    first, end = (part.start, part.end) if part else (0, None)
    folder = os.path.dirname(path)
    for index, name, captions, uid, error in itertools.islice(_records(path), first, end):
        data: bytes | None = None
        if error is None:
            fs, inner = open_fs(join(folder, name))
            try:
                with named_errors(join(folder, name)):
                    data = fs.cat_file(inner)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                data = None
        yield Sample(index, printable(os.path.splitext(name)[0]), data, captions=captions, uid=uid, error=error)


def plan_parts(path: str, part_bytes: int) -> tuple[list[Part], str]:
    """Parts of so many lines that there are about as many as the pictures' bytes would ask for, at 50 KB a picture."""
    lines = max(part_bytes // 50_000, 1)
    damaged = ""
    count = 0
    try:
        for _ in _records(path):
            count += 1
    except DamagedShard as error:
        damaged = str(error)
    return [Part(i, min(lines, count - i), i, min(i + lines, count)) for i in range(0, count, lines)], damaged


def read_image(path: str, *, index: int, offset: int, size: int) -> bytes:
    sample = next(iter_samples(path, Part(index, 1, index, index + 1)), None)
    if sample is None or sample.image is None:
        raise FileNotFoundError(errno.ENOENT, f"the picture of line {index} is not there", path)
    return sample.image


def _records(path: str) -> Iterator[tuple[int, str, list[str], str | None, str | None]]:
    """Index, picture, captions, uid and reason of every sample; no picture is opened."""
    with reading(path) as file:
        rows = csv_rows(file) if path.endswith(".csv") else json_rows(file)
        index = 0
        for name, lines in itertools.groupby(rows, key=lambda row: row[0]):
            if name is None:
                for _ in lines:
                    yield index, f"line-{index}", [], None, BAD_RECORD
                    index += 1
                continue
            said: list[str] = []
            uid = as_uid(os.path.splitext(os.path.basename(name))[0])
            for _, captions, given in lines:
                said += captions
                uid = uid or as_uid(given)
            good, error = clean_captions(said)
            unsafe = is_unsafe(name) or "://" in name
            yield index, name, good, uid, UNSAFE_NAME if unsafe else error
            index += 1


_Row = tuple[str | None, list[str], object]
"""Picture (None for a line that cannot be read), captions, uid."""


def csv_rows(file: BinaryIO) -> Iterator[_Row]:
    """Lines of captions.csv; no picture is opened. :raises DamagedShard: where it is no such file."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
    head = text.readline()
    delimiter = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
    fields = next(csv.reader([head], delimiter=delimiter), [])
    image, caption = _field(IMAGE_FIELDS, fields), _field(CAPTION_FIELDS, fields)
    if image is None or caption is None:
        raise DamagedShard(
            f"its first line must name a picture ({', '.join(IMAGE_FIELDS)}) and a caption column ({', '.join(CAPTION_FIELDS)})"
        )
    at, said_at, uid_at = fields.index(image), fields.index(caption), fields.index("uid") if "uid" in fields else -1
    reader = csv.reader(text, delimiter=delimiter)
    while True:
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise DamagedShard(f"line {reader.line_num + 1} is no CSV ({error})") from error
        if row:
            good = len(row) == len(fields) and row[at] != ""
            yield (row[at], [row[said_at]], row[uid_at] if uid_at >= 0 else None) if good else (None, [], None)


def json_rows(file: BinaryIO) -> Iterator[_Row]:
    """Lines of captions.jsonl; no picture is opened."""
    for line in file:
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8-sig", errors="surrogateescape"))
        except (ValueError, RecursionError):
            row = None
        image = _field(IMAGE_FIELDS, row) if isinstance(row, dict) else None
        if image is None or not isinstance(row[image], str) or not row[image]:
            yield None, [], None
            continue
        caption = _field(CAPTION_FIELDS, row)
        said = row[caption] if caption else []
        yield row[image], [c for c in (said if isinstance(said, list) else [said]) if isinstance(c, str)], row.get("uid")


def _field(names: tuple[str, ...], there: object) -> str | None:
    return next((name for name in names if name in there), None)  # type: ignore[operator]
