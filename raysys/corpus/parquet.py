"""Parquet files with the bytes of pictures: Hugging Face's ``image: {bytes, path}``, or a plain binary column.

Columns are known by their names (``IMAGE_COLUMNS``, ``CAPTION_COLUMNS``, ``KEY_COLUMNS``, first that is there). Without a key column the key
is the picture's path without its suffix, else the row's number.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from raysys.corpus.samples import UNSAFE_NAME, DamagedShard, Part, Sample, as_uid, clean_captions, is_unsafe, printable
from raysys.storage import reading

IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "image_bytes", "bytes")
CAPTION_COLUMNS = ("captions", "caption", "txt", "text", "TEXT", "sentences", "raw")
KEY_COLUMNS = ("key", "__key__", "uid", "id", "image_id", "filename", "file_name")
_ROWS = 16
"""Rows read at a time: some MB of pictures."""


def iter_samples(path: str, part: Part | None) -> Iterator[Sample]:
    """Of a row group that is damaged the rows before the damage; the other groups are read all the same."""
    with reading(path, ahead_bytes=0) as file:
        table = open_file(file)
        columns = columns_of(table.schema_arrow)
        first = part.first if part else 0
        damage = []
        for group in range(part.start, part.end) if part else range(table.num_row_groups):
            index, first = first, first + table.metadata.row_group(group).num_rows
            try:
                for batch in table.iter_batches(_ROWS, row_groups=[group], columns=_leaves(columns)):
                    for row in batch.to_pylist():
                        yield sample_of(index, row, columns)
                        index += 1
            except (pa.ArrowException, OSError) as error:
                refuse_storage_error(error)
                damage.append(f"rows {index} to {first - 1} cannot be read: {error}")
    if damage:
        raise DamagedShard("; ".join(damage))


def plan_parts(path: str, part_bytes: int) -> tuple[list[Part], str]:
    """Row groups are not cut."""
    with reading(path, ahead_bytes=0) as file:
        try:
            meta = open_file(file).metadata
        except DamagedShard as error:
            return [], str(error)
    parts: list[Part] = []
    first = count = start = size = 0
    for group in range(meta.num_row_groups):
        count, size = count + meta.row_group(group).num_rows, size + meta.row_group(group).total_byte_size
        if size >= part_bytes or group + 1 == meta.num_row_groups:
            parts.append(Part(first, count, start, group + 1))
            first, count, start, size = first + count, 0, group + 1, 0
    return parts, ""


def read_image(path: str, *, index: int, offset: int, size: int) -> bytes:
    with reading(path, ahead_bytes=0) as file:
        table = open_file(file)
        columns = columns_of(table.schema_arrow)
        for group in range(table.num_row_groups):
            rows = table.metadata.row_group(group).num_rows
            if index < rows:
                column = table.read_row_group(group, columns=_leaves({"image": columns["image"]})).column(0)
                return sample_of(index, {columns["image"]: column[index].as_py()}, {"image": columns["image"]}).image or b""
            index -= rows
    raise IndexError(f"{path} has no row {index}")


def row_group_images(path: str, group: int) -> list[bytes | None]:
    """The bytes of every picture of a row group; None where there is none."""
    with reading(path, ahead_bytes=0) as file:
        table = open_file(file)
        columns = {"image": columns_of(table.schema_arrow)["image"]}
        rows = table.read_row_group(group, columns=_leaves(columns)).to_pylist()
        return [sample_of(index, row, columns).image for index, row in enumerate(rows)]


@dataclass(frozen=True)
class Columns:
    """What stands beside the pictures of a file."""

    table: pa.Table
    """The columns that were asked for, as far as they are there; its schema has the file's metadata."""
    row_groups: list[int]
    """Rows of each row group."""


def read_columns(path: str, names: Collection[str]) -> Columns:
    """Columns by their names, whole; the column of pictures is never among them.

    :raises DamagedShard: for a file that is no Parquet, or has no pictures.
    """
    with reading(path, ahead_bytes=0) as file:
        table = open_file(file)
        image, meta = columns_of(table.schema_arrow)["image"], table.metadata
        rows = [meta.row_group(i).num_rows for i in range(table.num_row_groups)]
        wanted = [name for name in table.schema_arrow.names if name in names and name != image]
        try:
            content = table.read(columns=wanted)
        except (pa.ArrowException, OSError) as error:
            refuse_storage_error(error)
            raise DamagedShard(f"columns {', '.join(wanted)} cannot be read ({error})") from error
    return Columns(content, rows)


def open_file(file: BinaryIO) -> pq.ParquetFile:
    """:raises DamagedShard: where it is no Parquet."""
    try:
        return pq.ParquetFile(file, pre_buffer=False, buffer_size=4 << 20)  # streams column chunks: a row group may be large
    except (pa.ArrowException, OSError) as error:
        refuse_storage_error(error)
        raise DamagedShard(f"no Parquet file, or cut off ({error})") from error


def refuse_storage_error(error: Exception) -> None:
    """Arrow says of a damaged file an OSError without a number; all others come from storage and say nothing of the file."""
    if isinstance(error, OSError) and (type(error) is not OSError or error.errno is not None):
        raise error


def columns_of(schema: pa.Schema) -> dict[str, str]:
    """Role -> name of the column. :raises DamagedShard: where there are no pictures."""
    found: dict[str, str] = {}
    for role, names in (("image", IMAGE_COLUMNS), ("caption", CAPTION_COLUMNS), ("key", KEY_COLUMNS), ("uid", ("uid",))):
        fits = [name for name in names if name in schema.names and _fits(role, schema.field(name).type)]
        if fits:
            found[role] = fits[0]
    if "image" not in found:
        raise DamagedShard(f"no column of pictures (binary, or a struct with bytes, named {', '.join(IMAGE_COLUMNS)})")
    return found


def _fits(role: str, kind: pa.DataType) -> bool:
    if role == "image":
        inner = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
        return pa.types.is_binary(inner) or pa.types.is_large_binary(inner)
    if role == "caption" and (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        kind = kind.value_type
        if pa.types.is_struct(kind):
            return kind.get_field_index("raw") >= 0
    text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return text or (role == "key" and pa.types.is_integer(kind))


def _leaves(columns: dict[str, str]) -> list[str]:
    return sorted(set(columns.values()))


def sample_of(index: int, row: dict[str, Any], columns: dict[str, str]) -> Sample:
    """A row as a sample. :param columns: as :func:`columns_of` gives them."""
    image = row[columns["image"]]
    data, name = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    given = row.get(columns.get("key", ""))
    key = printable(text_of(given)) if given is not None else os.path.splitext(name)[0] if name else f"{index:09d}"
    several = row.get(columns.get("caption", ""))
    captions, error = clean_captions([text_of(c) for c in (several if isinstance(several, list) else [several]) if c is not None])
    error = UNSAFE_NAME if is_unsafe(key) else error
    uid = as_uid(row.get(columns.get("uid", ""))) or as_uid(os.path.basename(key))
    return Sample(index, key, data, captions=captions, uid=uid, error=error)


def text_of(value: Any) -> str:
    """Text of a cell; of bytes what is UTF-8 (lone surrogates elsewhere)."""
    if isinstance(value, dict):
        value = value.get("raw", "")
    return value.decode("utf-8", errors="surrogateescape") if isinstance(value, bytes) else str(value)
