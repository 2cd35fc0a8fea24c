"""Some rows of annotations with their pictures, for people: the report's page, TensorBoard.

In: a folder of Parquet files with a row a sample (annotations, a selection). Out: rows from shards all over the corpus, so that a page about
a billion rows costs a hundred small reads; which of them are worth showing; a picture's bytes from its shard.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysys.corpus.prefetch import prefetch
from raysys.corpus.shards import read_image, shard_path
from raysys.masking import resolved
from raysys.patience import StorageDown
from raysys.storage import identity, join, list_files, reading

COLUMNS = ("shard", "index", "key", "offset", "size", "caption", "regions", "text_area", "error")
"""What a picture is shown with."""
MAX_ROWS = 20_000
"""Rows that are looked at."""
MAX_SHARDS = 100
"""Shards that they come from."""
MAX_PICTURES = 12
"""Pictures of a group."""
FEW = 4
"""Pictures of a group where the shards are no tars, and large."""
LARGE = 5_000
"""Rows of a shard from which on a picture of it is dear where it is no tar."""
READS_AT_ONCE = 16
"""Parquet files."""
PICTURES_AT_ONCE = 8
"""Each waits for storage first; the largest take a quarter of a GiB each."""
T = TypeVar("T")


def read_sample(folder: str, columns: tuple[str, ...] = COLUMNS) -> tuple[pa.Table, int, int]:
    """At most MAX_ROWS rows from MAX_SHARDS evenly spaced files: all rows, in order, where there are no more.

    Each file gives the same share of its rows, so shares of the table estimate shares of the corpus.

    :param folder: ``A/shards``.
    :returns: the table, with a column ``identity`` (size and time of the shard that a row was made of); rows of the files read, of which
        it may hold a part; number of files in the folder.
    :raises UserError: where the folder holds no such file.
    """
    root, there = list_files(folder, ".parquet")
    there = sorted(there)
    chosen = [there[i] for i in _spread(len(there), MAX_SHARDS)]
    sizes = list(prefetch(chosen, lambda name: _open(join(root, name), lambda file: file.metadata.num_rows), threads=READS_AT_ONCE, ahead=READS_AT_ONCE))  # fmt: skip
    quotas = dict(zip(chosen, _share_out(sizes, MAX_ROWS), strict=True))

    def read(name: str) -> pa.Table:
        return _open(join(root, name), lambda file: _some_rows(file, list(columns), quotas[name]))

    tables = list(prefetch(chosen, read, threads=READS_AT_ONCE, ahead=READS_AT_ONCE))
    return pa.concat_tables(tables).combine_chunks(), sum(sizes), len(there)


def _open(path: str, look: Callable[[pq.ParquetFile], Any]) -> Any:
    with reading(path) as file:
        return look(pq.ParquetFile(file))


def _spread(num: int, most: int) -> list[int]:
    """At most so many of 0 .. num - 1, evenly spaced, with both ends."""
    return np.linspace(0, num - 1, min(most, num)).round().astype(int).tolist()


def _share_out(sizes: list[int], most: int) -> list[int]:
    """How many of each, in proportion; all where there are no more."""
    ends = np.cumsum([0, *sizes])
    share = min(1.0, most / max(int(ends[-1]), 1))
    return np.diff((ends * share).round().astype(int)).tolist()


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


def show_rows(
    rows: Sequence[dict[str, Any]], roots: dict[str, str], draw: Callable[[dict[str, Any], bytes], T]
) -> list[T | OSError | ValueError]:
    """What ``draw`` makes of each row and its picture, in order, or why there is nothing; several beside each other where they are in tars.

    Storage that does not answer is waited for once, not by every picture.
    """
    down = threading.Event()

    def show(row: dict[str, Any]) -> T | OSError | ValueError:
        if down.is_set():
            return ValueError("its storage does not answer")
        try:
            return draw(row, sample_bytes(row, roots))
        except (OSError, ValueError) as error:
            if isinstance(error, StorageDown):
                down.set()
            return error

    cheap = all(row["shard"].endswith(".tar") for row in rows)
    with ThreadPoolExecutor(PICTURES_AT_ONCE if cheap else 1, thread_name_prefix="pictures") as threads:
        return list(threads.map(show, rows))


def most_pictures(table: pa.Table, most: int = MAX_PICTURES) -> int:
    """Of a group: fewer where a picture costs the reading of a row group or a captions file."""
    cheap = pc.or_(pc.ends_with(table["shard"], ".tar"), pc.less(table["index"], LARGE))
    return most if pc.all(cheap).as_py() else min(FEW, most)


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
