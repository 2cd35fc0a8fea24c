"""Which samples a run trains on, and where each lies; in memory there is a line a shard, the rest is read a block at a time.

In: a table of shards (how many samples of each are kept), Parquet files with a row for every sample (``offset``, ``size``, ``caption``), and,
where not every row is kept, Parquet files with a column ``keep``. Out: pictures and captions of any range of kept samples. Pictures come
straight from the original tars, neighbours in one ranged read.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.corpus.samples import shard_hash
from raysys.corpus.shards import shard_path
from raysys.corpus.tars import read_images
from raysys.errors import UserError
from raysys.masking import mask
from raysys.storage import join, read_bytes, reading, writing

SHARDS_SCHEMA = pa.schema([("name", pa.string()), ("rows", pa.int64()), ("kept", pa.int64()), ("identity", pa.string())])
"""``shards.arrow``: a line for every shard, sorted by name; ``identity`` as a listing gave it when the offsets were taken."""
SHARDS_FILE = "shards.arrow"
_OPEN_SHARDS = 512
"""Shards of which a process remembers the footer and which rows are kept: some 100 KB each."""


def write_shards_table(folder: str, table: pa.Table, *, tmp_folder: str) -> None:
    with writing(join(folder, SHARDS_FILE), tmp_folder=tmp_folder) as file, pa.ipc.new_file(file, SHARDS_SCHEMA) as out:
        out.write_table(table)


def read_shards_table(folder: str) -> pa.Table:
    """:raises FileNotFoundError: where it is not there."""
    return pa.ipc.open_file(pa.BufferReader(read_bytes(join(folder, SHARDS_FILE)))).read_all()


@dataclass
class SampleIndex:
    """The kept samples of a corpus, in shard order. Small, and may travel to other processes."""

    roots: dict[str, str]
    """Source -> root of its shards."""
    names: pa.Array
    """string [shards]"""
    kept: np.ndarray
    """int64 [shards]: kept samples of each."""
    size: np.ndarray
    """int64 [shards]: bytes of each."""
    rows_folder: str
    """Holds ``NAME.parquet`` with a row for every sample."""
    keep_folder: str | None
    """Holds ``NAME.parquet`` with the column ``keep``; None where every row is kept."""
    num_samples_before: int
    """Samples of the corpus before anything was dropped."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why the others are not kept."""

    def __len__(self) -> int:
        return int(self.kept.sum())


@dataclass
class Block:
    """Neighbouring kept samples of a shard, read."""

    first: int
    """Position of the first among all kept samples."""
    path: str
    shard: int
    """64 bits of the shard's name: with the offset, which picture it is, whatever else is kept."""
    offset: np.ndarray
    """int64 [n]"""
    pictures: list[memoryview]
    captions: pa.Array
    """list<string> [n]"""
    bytes_read: int
    """From the shard."""

    def __len__(self) -> int:
        return len(self.pictures)


class BlockReader:
    """Ranged reads of one process. Safe to use from several threads."""

    def __init__(self, index: SampleIndex) -> None:
        self._index = index
        self._ends = np.cumsum(index.kept)
        self._rows: OrderedDict[int, _ShardRows] = OrderedDict()
        self._lock = Lock()

    def ranges(self, samples: np.ndarray) -> list[tuple[int, int]]:
        """Sorted positions of samples -> ranges [first, end) of neighbours within a shard, each for one :meth:`read`."""
        shard = np.searchsorted(self._ends, samples, side="right")
        cuts = np.flatnonzero((np.diff(samples) != 1) | (np.diff(shard) != 0)) + 1
        return [(int(run[0]), int(run[-1]) + 1) for run in np.split(samples, cuts) if len(run)]

    def read(self, first: int, end: int) -> Block:
        """Kept samples ``first .. end - 1``, all of one shard.

        :raises UserError: where the files do not fit the index.
        """
        name, table = self._places(first, end)
        path = shard_path(self._index.roots, name)
        offset = table["offset"].to_numpy()
        pictures, bytes_read = read_images(path, offset, table["size"].to_numpy())
        return Block(first, path, shard_hash(name), offset, pictures, table["caption"].combine_chunks(), bytes_read)

    def places(self, first: int, end: int) -> pa.Table:
        """Columns ``offset``, ``size`` and ``caption`` of what :meth:`read` reads; no picture."""
        return self._places(first, end)[1]

    def _places(self, first: int, end: int) -> tuple[str, pa.Table]:
        """Name of the shard, and where its samples lie."""
        shard = int(np.searchsorted(self._ends, first, side="right"))
        before = int(self._ends[shard] - self._index.kept[shard])
        name = self._index.names[shard].as_py()
        return name, self._shard_rows(shard, name).read(first - before, end - before)

    def _shard_rows(self, shard: int, name: str) -> _ShardRows:
        with self._lock:
            found = self._rows.get(shard)
            if found is not None:
                self._rows.move_to_end(shard)
                return found
        index = self._index
        keep_file = join(index.keep_folder, f"{name}.parquet") if index.keep_folder else None
        opened = _ShardRows(join(index.rows_folder, f"{name}.parquet"), keep_file, int(index.kept[shard]))
        with self._lock:
            self._rows[shard] = opened
            while len(self._rows) > _OPEN_SHARDS:
                self._rows.popitem(last=False)
        return opened


class _ShardRows:
    """A shard's rows: footer and keep flags in memory, row groups read as they are asked for."""

    def __init__(self, rows_file: str, keep_file: str | None, num_kept: int) -> None:
        self._file = rows_file
        with reading(rows_file, ahead_bytes=0) as file:
            self._footer = pq.read_metadata(file)
        groups = [self._footer.row_group(group).num_rows for group in range(self._footer.num_row_groups)]
        self._group_ends = np.cumsum(np.array(groups, dtype=np.int64))
        keep = np.ones(self._footer.num_rows, dtype=bool)
        if keep_file is not None:
            with reading(keep_file) as file:
                keep = pq.read_table(file, columns=["keep"])["keep"].to_numpy()
        if len(keep) != self._footer.num_rows or keep.sum() != num_kept:
            raise UserError(
                f"{mask(keep_file or rows_file)}: changed since the run began; its rows do not fit any more; begin a new run (another output)"
            )
        self._keep = np.packbits(keep)

    def read(self, first: int, end: int) -> pa.Table:
        """Columns ``offset``, ``size`` and ``caption`` of the kept samples ``first .. end - 1`` of the shard."""
        rows = np.flatnonzero(np.unpackbits(self._keep, count=self._footer.num_rows))[first:end]
        low, high = np.searchsorted(self._group_ends, [rows[0], rows[-1]], side="right")
        with reading(self._file, ahead_bytes=0) as file:
            opened = pq.ParquetFile(file, metadata=self._footer)
            table = opened.read_row_groups(list(range(low, high + 1)), columns=["offset", "size", "caption"], use_threads=False)
        before = int(self._group_ends[low - 1]) if low else 0
        return table.take(pa.array(rows - before))
