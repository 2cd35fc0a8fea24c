"""Sets of pictures on which a wrong word stands (RTA-100, PAINT, SCAM): picture, true label, written label.

In: :class:`TypographicSetConfig`. Out: :class:`ClassSet` with ``written``. Opens no picture.

A label is a class by its words: spaces around and between words do not count, nor does upper case; ``_`` in the name of a picture is a space,
in a table it is a ``_``. Of several spellings the lower case stands in the prompts.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import TypographicSetConfig
from raysys.corpus.samples import printable
from raysys.errors import UserError
from raysys.evaluation.class_sets import (
    ClassSet,
    feature_names,
    is_picture,
    list_set,
    match_names,
    parquet_pictures,
    read_templates,
    read_text,
)
from raysys.evaluation.pictures import Picture
from raysys.masking import mask
from raysys.output import fingerprint
from raysys.storage import join, read_bytes

PICTURE_COLUMNS = ("file_name", "image", "picture", "filename", "path", "id")
TRUE_COLUMNS = ("true_class", "label", "object_label", "object", "true_label")
WRITTEN_COLUMNS = ("written_class", "attack_word", "text", "written_label", "typographic_label", "attack")
TYPE_COLUMN = "type"
METADATA_FILES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Hugging Face's imagefolder."""
_IN_NAME = re.compile(r"label=(?P<true>.+?)_text=(?P<written>.+)", re.DOTALL)


@dataclass(frozen=True)
class _Said:
    """What is said of a picture."""

    true: str
    written: str
    type: str
    """Empty where there is no column of it."""


def read_typographic_set(cfg: TypographicSetConfig, key: str = "typographic") -> ClassSet:
    """List pictures, the label of each and the label written on it. Where the labels stand, first that is there:

    - ``labels``: a table with a line a picture (CSV, JSON lines, Parquet);
    - columns of the Parquet files that hold the pictures (SCAM on Hugging Face);
    - metadata.csv, metadata.jsonl or metadata.parquet beside the pictures;
    - the pictures' names, ``label=TRUE_text=WRITTEN.png``.

    Columns are known by their names (``PICTURE_COLUMNS``, ``TRUE_COLUMNS``, ``WRITTEN_COLUMNS``, first that is there). Class ids are the
    class names: those of ``classes``, else all true and written labels, sorted.

    :param key: where the config stands in the user's words, for messages.
    :raises UserError: for a set that is missing, empty or damaged, a picture without a label or the reverse, several types and none chosen.
    """
    if cfg.path is None:
        raise UserError(f"{key}.path is missing: a folder of pictures, or Parquet files with them")
    where = f"{key}.path={mask(cfg.path)}"
    root, files = list_set(cfg.path, key)
    shards = [name for name in files if name.endswith(".parquet") and os.path.basename(name) not in METADATA_FILES]
    names = [name for name in files if is_picture(name)]
    if not names and not shards:
        raise UserError(f"{where}: no pictures there, nor Parquet files with pictures; give the folder that holds them")
    if names and shards:
        raise UserError(f"{where}: holds pictures ({names[0]}) and Parquet files ({shards[0]}); name the Parquet files with a glob, or give "
                        "the folder of the pictures")  # fmt: skip
    layout = "parquet" if shards else "folders" if all("/" in name for name in names) else "flat"
    if shards:
        if cfg.labels is not None:
            raise UserError(
                f"{key}.labels is for a folder of pictures; the labels of Parquet files are columns of theirs; leave the key out"
            )
        pictures, said, marks = _parquet(root, shards)
    else:
        pictures = [Picture(printable(name), join(root, name)) for name in names]
        marks = [files[name] for name in names]
        tables = [name for name in files if os.path.basename(name) in METADATA_FILES]
        said = _table_of(cfg.labels, root, tables, names, where) if cfg.labels or tables else _from_names(names, where, key)
    rows, notes = _of_type(cfg.type, list(zip(pictures, said, marks, strict=True)), where, key)
    pictures, said = [picture for picture, _, _ in rows], [one for _, one, _ in rows]
    empty = [picture.name for picture, one in zip(pictures, said, strict=True) if not one.true or not one.written]
    if empty:
        raise UserError(
            f"{where}: {empty[0]} has an empty true or written label ({len(empty):,} of {len(said):,} pictures have); "
            "fill it in, or take the picture out"
        )

    class_names = _classes(cfg.classes, said)
    index = {name.casefold(): i for i, name in enumerate(class_names)}
    unknown = next((label for one in said for label in (one.true, one.written) if label.casefold() not in index), None)
    if unknown is not None:
        raise UserError(f"{where}: label '{unknown}' is not in {key}.classes={mask(cfg.classes or '')}; add a line")
    labels = [index[one.true.casefold()] for one in said]
    written = [index[one.written.casefold()] for one in said]
    templates = read_templates(cfg.templates or "simple", key)
    places = [(picture.name, mark) for picture, _, mark in rows]
    mark = fingerprint([places, labels, written, class_names, templates])
    return ClassSet(pictures, labels, list(class_names), class_names, templates, mark, written, layout, notes)


def _of_type(
    type_: str | None, rows: list[tuple[Picture, _Said, Any]], where: str, key: str
) -> tuple[list[tuple[Picture, _Said, Any]], list[str]]:
    """The rows of a type, and the note that there are others."""
    types = sorted({said.type for _, said, _ in rows})
    known = ", ".join(f"'{name}'" for name in types)
    if type_ is None:
        if len(types) > 1:
            raise UserError(f"{where}: its column {TYPE_COLUMN} says {known}; choose one with {key}.type=NAME")
        return rows, []
    chosen = [row for row in rows if row[1].type == type_]
    if not chosen:
        has = f"its column {TYPE_COLUMN} says {known}" if any(types) else f"there is no column {TYPE_COLUMN}"
        raise UserError(f"{key}.type={type_}: no picture of {where} is of this type; {has}; choose another, or leave the key out")
    return chosen, [f"{len(chosen):,} of {len(rows):,} pictures: type {type_}"] if len(chosen) < len(rows) else []


def _classes(file: str | None, said: list[_Said]) -> list[str]:
    """Every possible answer once: of one that is spelt in two ways the lower case."""
    if file is None:
        return sorted({label.casefold(): label for label in sorted(_labels(said))}.values())
    names = [name for name in map(_words, read_text(file).splitlines()) if name]
    if not names:
        raise UserError(f"{mask(file)}: is empty; expected one possible answer a line")
    twice = next((name for name, count in Counter(name.casefold() for name in names).items() if count > 1), None)
    if twice is not None:
        raise UserError(f"{mask(file)}: '{twice}' is there twice; give it once")
    return names


def _labels(said: list[_Said]) -> set[str]:
    return {label for one in said for label in (one.true, one.written)}


def _words(label: str) -> str:
    return " ".join(label.split())


# ---- where the labels stand --------------------------------------------------------------------------------------------


def _from_names(names: list[str], where: str, key: str) -> list[_Said]:
    matches = [_IN_NAME.fullmatch(os.path.splitext(os.path.basename(name))[0]) for name in names]
    said = [_Said(_words(m["true"].replace("_", " ")), _words(m["written"].replace("_", " ")), "") for m in matches if m]
    if len(said) < len(names):
        first = names[matches.index(None)]
        raise UserError(f"{where}: {first} is not named label=TRUE_text=WRITTEN ({len(names) - len(said):,} of {len(names):,} are not), and "
                        f"there is no {METADATA_FILES[0]} with them; give {key}.labels=FILE")  # fmt: skip
    return said


def _table_of(given: str | None, root: str, tables: list[str], names: list[str], where: str) -> list[_Said]:
    """From ``labels``, else from the metadata files; these name pictures by their path from the folder that they lie in."""
    rows: list[tuple[str, _Said]] = []
    for folder, file in [("", given)] if given else [(os.path.dirname(table), join(root, table)) for table in tables]:
        cells = _read_table(file)
        picture = _column(PICTURE_COLUMNS, cells, file)
        named = [name.strip() for name in cells[picture]]
        rows += [(join(folder, name) if folder else name, one) for name, one in zip(named, _said(cells, file), strict=True)]
    return match_names(rows, names, mask(given or ", ".join(tables)), where)


def _parquet(root: str, shards: list[str]) -> tuple[list[Picture], list[_Said], list[Any]]:
    pictures, said, marks = [], [], []
    for shard in shards:
        columns, some, their_marks = parquet_pictures(root, shard, {*TRUE_COLUMNS, *WRITTEN_COLUMNS, TYPE_COLUMN})
        pictures += some
        marks += their_marks
        said += _said(_cells(columns.table, join(root, shard)), join(root, shard))
    return pictures, said, marks


def _said(cells: dict[str, list[str]], file: str) -> list[_Said]:
    true, written = (_column(names, cells, file) for names in (TRUE_COLUMNS, WRITTEN_COLUMNS))
    types = cells.get(TYPE_COLUMN, [""] * len(cells[true]))
    return [_Said(_words(t), _words(w), kind.strip()) for t, w, kind in zip(cells[true], cells[written], types, strict=True)]


def _column(names: Collection[str], cells: Collection[str], file: str) -> str:
    found = next((name for name in names if name in cells), None)
    if found is None:
        raise UserError(f"{mask(file)}: no column of the names {', '.join(names)}; it has {', '.join(cells) or 'none'}; rename one")
    return found


def _read_table(file: str) -> dict[str, list[str]]:
    """Columns of a CSV, JSON lines or Parquet file, as text."""
    if file.endswith(".parquet"):
        try:
            return _cells(pq.read_table(io.BytesIO(read_bytes(file))), file)
        except FileNotFoundError as error:
            raise UserError(f"{mask(file)}: no such file; check the path") from error
        except pa.ArrowException as error:
            raise UserError(f"{mask(file)}: cannot be read as Parquet ({str(error).splitlines()[0]}); fetch it again") from error
    text = read_text(file)
    if file.endswith((".jsonl", ".json")):
        rows = list(_json_rows(text, file))
    else:
        head = text.partition("\n")[0]
        delimiter = "\t" if "\t" in head else ";" if ";" in head and "," not in head else ","
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        fields = [name.strip() for name in next(reader, [])]
        rows = []
        for row in reader:
            if row and len(row) != len(fields):
                raise UserError(
                    f"{mask(file)}: line {reader.line_num} has {len(row)} cells, the first line {len(fields)}; "
                    f"a cell with {delimiter!r} in it stands in double quotes"
                )
            rows += [dict(zip(fields, row, strict=True))] if row else []
    if not rows:
        raise UserError(f"{mask(file)}: no lines with labels; give a line of column names, then one a picture")
    return {name: [_text(row.get(name)) for row in rows] for name in rows[0]}


def _json_rows(text: str, file: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise UserError(f"{mask(file)}: line {number} is no JSON object; expected one a line")
        yield row


def _cells(table: pa.Table, file: str) -> dict[str, list[str]]:
    cells = {}
    for name in table.column_names:
        values = table.column(name).to_pylist()
        if name in (*TRUE_COLUMNS, *WRITTEN_COLUMNS) and pa.types.is_integer(table.schema.field(name).type):
            meaning = feature_names(table.schema, name)
            if meaning is None or not all(value is not None and 0 <= value < len(meaning) for value in values):
                raise UserError(f"{mask(file)}: column {name} holds numbers, and nothing says what they mean; give words")
            values = [meaning[value] for value in values]
        cells[name] = [_text(value) for value in values]
    return cells


def _text(value: object) -> str:
    return "" if value is None else str(value)
