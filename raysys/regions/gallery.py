"""Some rows of annotations with their pictures, for people: the report's page, TensorBoard.

In: a folder of Parquet files with a row a sample (annotations, a selection). Out: rows from shards all over the corpus, so that a page about
a billion rows costs a hundred small reads; which of them are worth showing; a picture's bytes from its shard.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.corpus.prefetch import prefetch
from raysys.corpus.shards import read_image, shard_path
from raysys.masking import resolved
from raysys.storage import identity, join, list_files, reading

COLUMNS = ("shard", "index", "key", "offset", "size", "caption", "regions", "text_area", "error")
"""What a picture is shown with."""
MAX_ROWS = 20_000
"""Rows that are looked at."""
MAX_SHARDS = 100
"""Shards they come from."""
MAX_PICTURES = 12
"""Pictures of a group."""
READS_AT_ONCE = 16


def read_sample(
    folder: str, columns: tuple[str, ...] = COLUMNS, *, names: list[str] | None = None
) -> tuple[pa.Table, int, list[str]]:
    """At most MAX_ROWS rows, evenly from MAX_SHARDS evenly spaced files: all rows, in order, where there are no more.

    :param folder: ``A/shards`` or ``S/selection``.
    :param names: files instead of those that the folder lists.
    :returns: the table, with a column ``identity`` (size and time of the shard that a row was made of); rows of the files read, of which
        it may hold a part; names of the files, as many as were read and then all others.
    :raises UserError: where the folder holds no such file.
    """
    root, there = list_files(folder, ".parquet")
    there = sorted(there) if names is None else names
    chosen = [there[i] for i in _spread(len(there), MAX_SHARDS)]
    sizes = list(prefetch(chosen, lambda name: _open(join(root, name), lambda file: file.metadata.num_rows), threads=READS_AT_ONCE, ahead=READS_AT_ONCE))  # fmt: skip
    quotas = dict(zip(chosen, _share_out(sizes, MAX_ROWS), strict=True))

    def read(name: str) -> pa.Table:
        return _open(join(root, name), lambda file: _some_rows(file, list(columns), quotas[name]))

    tables = list(prefetch(chosen, read, threads=READS_AT_ONCE, ahead=READS_AT_ONCE))
    others = sorted(set(there) - set(chosen))
    return pa.concat_tables(tables).combine_chunks(), sum(sizes), [*chosen, *others]


def _open(path: str, look: Callable[[pq.ParquetFile], Any]) -> Any:
    with reading(path) as file:
        return look(pq.ParquetFile(file))


def _spread(num: int, most: int) -> list[int]:
    """At most so many of 0 .. num - 1, evenly spaced, with both ends."""
    return np.linspace(0, num - 1, min(most, num)).round().astype(int).tolist()


def _share_out(sizes: list[int], most: int) -> list[int]:
    """How many of each, evenly; what a small one cannot give the larger ones do."""
    quotas, left = [0] * len(sizes), most
    for place, i in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        quotas[i] = min(sizes[i], left // (len(sizes) - place))
        left -= quotas[i]
    return quotas


def _some_rows(file: pq.ParquetFile, columns: list[str], quota: int) -> pa.Table:
    """So many rows, from row groups all over the file."""
    made_of = (file.metadata.metadata or {}).get(b"raysys.identity", b"").decode()
    sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    needed = next((n for n in range(1, len(sizes) + 1) if sum(sizes[i] for i in _spread(len(sizes), n)) >= quota), len(sizes))
    groups = _spread(len(sizes), needed)
    quotas = _share_out([sizes[i] for i in groups], quota)
    tables = [file.read_row_group(i, columns=columns).slice(0, n) for i, n in zip(groups, quotas, strict=True)]
    table = pa.concat_tables(tables) if tables else file.schema_arrow.empty_table().select(columns)
    return table.replace_schema_metadata().append_column("identity", pa.array([made_of] * table.num_rows, pa.string()))


def sample_bytes(row: dict[str, Any], roots: dict[str, str]) -> bytes:
    """The encoded picture of a row, from its shard at (offset, size).

    :param roots: of the annotations' settings: source -> folder.
    :raises ValueError, OSError: where there is none, or the shard is not what it was.
    """
    shard = shard_path(resolved(roots), row["shard"])
    if row["identity"] and row["identity"] != identity(shard):
        raise ValueError("its shard has changed since it was annotated")
    if shard.endswith(".tar") and row["offset"] < 0:
        raise ValueError("there is none")
    return read_image(shard, index=row["index"], offset=row["offset"], size=row["size"])


def groups_of_annotations(table: pa.Table) -> dict[str, np.ndarray]:
    """Title -> rows worth showing, of a table with ``text_area`` and ``error``."""
    area = table["text_area"].to_numpy(zero_copy_only=False).astype(float)
    seen = np.flatnonzero(table["error"].is_null().to_numpy(zero_copy_only=False))
    order = seen[np.argsort(area[seen], kind="stable")]
    with_text, without = order[area[order] > 0], order[area[order] == 0]
    groups = {
        "With text, the least first": with_text[:MAX_PICTURES],
        "With text, the most first": with_text[MAX_PICTURES:][::-1][:MAX_PICTURES],
        "Without text": without[_spread(len(without), MAX_PICTURES)],
    }
    return {title: rows for title, rows in groups.items() if len(rows)}
