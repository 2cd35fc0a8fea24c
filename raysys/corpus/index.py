"""Which samples a run trains on, and where each lies: annotations + policy, a selection, or the tars alone -> :class:`SampleIndex`.

Pictures are read from the original shards by their place (one ranged read each); nothing is copied or rewritten.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import fsspec
import numpy as np
import pyarrow as pa

from raysys.storage import open_fs


@dataclass
class SampleIndex:
    """The kept samples of a corpus, in shard order."""

    paths: list[str]
    """Shards."""
    shard: np.ndarray
    """int32 [N]: position in ``paths``."""
    offset: np.ndarray
    """int64 [N]: first byte of the picture in its shard."""
    size: np.ndarray
    """int64 [N]: bytes of the picture."""
    captions: pa.ListArray
    """list<string> [N]; never empty."""
    num_samples_before: int
    """Samples of the corpus before anything was dropped."""
    reasons: dict[str, int] = field(default_factory=dict)
    """Why the others are not here."""

    def __len__(self) -> int:
        return len(self.shard)

    def captions_of(self, sample: int) -> list[str]:
        return self.captions[sample].as_py()

    def place(self, sample: int) -> str:
        """For messages: which picture this is."""
        return f"{self.paths[self.shard[sample]]} at byte {self.offset[sample]}"


class PictureReader:
    """Ranged reads of one process: remembers the filesystems, holds no file open. Safe to use from several threads."""

    def __init__(self, index: SampleIndex) -> None:
        self._index = index
        self._places: list[tuple[fsspec.AbstractFileSystem, str]] = [open_fs(path) for path in index.paths]

    def read(self, sample: int) -> bytes:
        fs, path = self._places[self._index.shard[sample]]
        first = int(self._index.offset[sample])
        return fs.cat_file(path, start=first, end=first + int(self._index.size[sample]))


@dataclass
class ShardRows:
    """What an index takes of one shard."""

    path: str
    offset: np.ndarray
    size: np.ndarray
    captions: pa.Array
    """list<string> [rows]"""
    keep: np.ndarray
    """bool [rows]"""
    reasons: Counter[str] = field(default_factory=Counter)


def build_index(shards: list[ShardRows]) -> SampleIndex:
    """Put the kept rows of all shards one behind the other."""
    return SampleIndex(
        paths=[s.path for s in shards],
        shard=np.repeat(np.arange(len(shards), dtype=np.int32), [int(s.keep.sum()) for s in shards]),
        offset=np.concatenate([s.offset[s.keep] for s in shards]),
        size=np.concatenate([s.size[s.keep] for s in shards]),
        captions=pa.concat_arrays([s.captions.filter(pa.array(s.keep)) for s in shards]),
        num_samples_before=sum(len(s.keep) for s in shards),
        reasons=dict(sum((s.reasons for s in shards), Counter())),
    )
