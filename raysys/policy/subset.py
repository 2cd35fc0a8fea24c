"""A subset file of DataComp from any number of uids: sorted, each once, byte for byte what ``np.save`` makes of ``np.unique``.

In: uids, some at a time. Out: one ``.npy``. The uids are sorted in runs, which lie in an unnamed file; then ranges of all runs are merged, one after the
other. Memory holds a few runs, however many uids there are and however they are spread; the disk holds 16 bytes a uid beside the result.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import BinaryIO

import numpy as np

from raysys.storage import writing

UID = np.dtype("u8,u8")
"""How DataComp writes a 128-bit uid: its first and its last 16 hex digits (github.com/mlfoundations/datacomp, apply_filter.py)."""
RUN_UIDS = 1 << 21
"""Uids that are sorted at once, 32 MB; a billion make 480 runs."""
SAMPLES_OF_RUN = 1 << 10
"""Evenly out of every run: where they lie together tells how to cut all runs into ranges of about a run."""
_KEY = np.dtype("S16")
"""A uid as its bytes, first digits first: they sort as the two numbers do, four times as fast."""


class SortedUids:
    """Takes uids and writes them once. Not for several threads."""

    def __init__(self, tmp_folder: str | None) -> None:
        """:param tmp_folder: a local one, for the runs; None: the system's."""
        if tmp_folder is not None:
            os.makedirs(tmp_folder, exist_ok=True)
        self._runs = tempfile.TemporaryFile(dir=tmp_folder)  # noqa: SIM115  # closed by __exit__
        self._ends = [0]
        """Where in the file the runs end, in uids."""
        self._samples: list[np.ndarray] = []
        self._waiting: list[np.ndarray] = []
        self._num_waiting = 0
        self._added = 0

    def __enter__(self) -> SortedUids:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._runs.close()

    def __len__(self) -> int:
        """Uids that were added, each as often as it was."""
        return self._added

    def add(self, uids: np.ndarray) -> None:
        """:param uids: ``UID`` [n], in any order."""
        self._waiting.append(uids)
        self._num_waiting += len(uids)
        self._added += len(uids)
        if self._num_waiting >= RUN_UIDS:
            self._end_run()

    def write(self, path: str, *, tmp_folder: str) -> None:
        """Everything that was added, as a subset file. :param tmp_folder: see :func:`raysys.storage.writing`."""
        self._end_run()
        with writing(path, tmp_folder=tmp_folder) as file:
            _write_header(file, self._added)
            written = 0
            for keys in self._merged():
                file.write(keys.view(">u8").astype("u8").data)
                written += len(keys)
            file.seek(0)
            _write_header(file, written)  # numpy leaves room for the digits of any number

    def _end_run(self) -> None:
        if self._num_waiting == 0:
            return
        uids = np.concatenate(self._waiting)
        self._waiting, self._num_waiting = [], 0
        keys = _sorted_once(uids.view("u8").astype(">u8").view(_KEY))
        self._runs.write(keys.view("u1").data)
        self._ends.append(self._ends[-1] + len(keys))
        self._samples.append(keys[:: max(len(keys) // SAMPLES_OF_RUN, 1)].copy())

    def _merged(self) -> Iterator[np.ndarray]:
        """``_KEY`` [n], ascending: range after range. One has about ``RUN_UIDS`` uids and at most a sample's distance of each run more."""
        self._runs.flush()
        runs = list(zip(self._ends[:-1], self._ends[1:], strict=True))
        cuts = np.unique(np.sort(np.concatenate([*self._samples, np.zeros(0, _KEY)]))[SAMPLES_OF_RUN::SAMPLES_OF_RUN])
        bounds = [
            [first, *(first + np.searchsorted(self._read([(first, end)]), cuts, side="right")).tolist(), end] for first, end in runs
        ]
        for number in range(len(cuts) + 1):
            yield _sorted_once(self._read([(of_run[number], of_run[number + 1]) for of_run in bounds]))

    def _read(self, spans: list[tuple[int, int]]) -> np.ndarray:
        """Keys ``first .. end - 1`` of the file for each of the spans, one behind the other."""
        keys = np.empty(sum(end - first for first, end in spans), _KEY)
        room, at = keys.view("u1"), 0
        for first, end in spans:
            at += os.preadv(self._runs.fileno(), [room[at : at + (end - first) * _KEY.itemsize].data], first * _KEY.itemsize)
        assert at == len(room)
        return keys


def _sorted_once(keys: np.ndarray) -> np.ndarray:
    """As ``np.unique``, in the array's own memory."""
    keys.sort()
    first = np.ones(len(keys), dtype=bool)
    first[1:] = keys[1:] != keys[:-1]
    return keys[first]


def _write_header(file: BinaryIO, uids: int) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": UID.descr, "fortran_order": False, "shape": (uids,)})
