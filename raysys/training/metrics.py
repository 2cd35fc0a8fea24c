"""A run's numbers: ``metrics.jsonl`` (one line a logged step) and TensorBoard, written by rank 0; and what a worker measures of itself.

In: numbers of a step. Out: ``R/metrics.jsonl``, ``R/tensorboard``, and :func:`read_metrics` for those who show them. Who may write is
left to :mod:`raysys.training.lock`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from raysys.board import Board
from raysys.patience import naming_full_disk
from raysys.storage import exists, is_local, join, named_errors, open_fs, read_bytes, write_bytes
from raysys.training.lock import RunLock

WRITE_EVERY_S = 10.0
"""Fewest seconds between two writes to an object store, which knows no append: each is of the whole log."""
TAIL_BYTES = 16 << 10
"""Holds the newest lines; one is under 1 KB."""
WRITE_SHARE = 0.01
"""Largest share of the time that those writes take; 1e6 steps with a line every 10 are 50 MB, and are then written once a minute."""


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Complete lines, in order; lines of one step (a validation comes later) are one, of a number that was logged twice the last."""
    path = join(run, "metrics.jsonl")
    if not exists(path):
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in read_bytes(path).splitlines(keepends=True):
        if line.endswith(b"\n"):  # a line without its end is still being written
            record = json.loads(line)
            by_step[record["step"]] = by_step.get(record["step"], {}) | record
    return [by_step[step] for step in sorted(by_step)]


def read_newest_metrics(run: str) -> list[dict[str, Any]]:
    """The newest complete lines, some twenty, in the order in which they were written; reads the end of the log only."""
    fs, path = open_fs(join(run, "metrics.jsonl"))
    try:
        with named_errors(run):
            end = fs.cat_file(path, start=-TAIL_BYTES)
    except FileNotFoundError:
        return []
    lines = end[: end.rfind(b"\n")].splitlines()
    whole = lines[1:] if len(end) >= TAIL_BYTES else lines  # the first may be the end of a line; a log that grows gives more
    return [json.loads(line) for line in whole]


class MetricsLog:
    """Each call that writes raises LostLock where another has taken over the run."""

    def __init__(self, run: str, lock: RunLock, *, first_step: int) -> None:
        """Take up the log of a run that goes on with ``first_step`` steps done: what was logged past it is dropped."""
        lock.check()
        self._lock, self._local = lock, is_local(run)
        self._path = join(run, "metrics.jsonl")
        kept = [_line(record) for record in read_metrics(run) if record["step"] <= first_step]
        self._lines = bytearray().join(kept)
        """Of an object store: the whole log."""
        write_bytes(self._path, bytes(self._lines))
        self._next_write = perf_counter() + WRITE_EVERY_S
        self._board = Board(join(run, "tensorboard"), purge_step=first_step + 1 if first_step else 0)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Log a step: into the local file at once, on an object store within about :data:`WRITE_EVERY_S`."""
        line = _line({"step": step, **metrics})
        self._board.scalars({name if "/" in name else f"train/{name}": value for name, value in metrics.items()}, step)
        if self._local:
            self._lock.check()
            _append(open_fs(self._path)[1], line)
        else:
            self._lines += line
            if perf_counter() >= self._next_write:
                self.flush()

    def show(self, step: int, numbers: Mapping[str, float], pictures: Mapping[str, Sequence[np.ndarray]]) -> None:
        """Numbers and pictures (:meth:`Board.pictures`) for TensorBoard alone, by tag; they are there at once."""
        self._board.scalars(numbers, step)
        for tag, of_tag in pictures.items():
            self._board.pictures(tag, of_tag, step)
        self.flush()

    def flush(self) -> None:
        """Bring all of it to storage: before a checkpoint is saved, so that a run that goes on from it has every line up to it."""
        if self._local:
            self._board.flush()
            return
        self._lock.check()
        begun = perf_counter()
        write_bytes(self._path, bytes(self._lines))
        self._board.flush()
        ended = perf_counter()
        self._next_write = ended + max(WRITE_EVERY_S, (ended - begun) / WRITE_SHARE)

    def close(self) -> None:
        """As :meth:`flush`; the log takes no more."""
        with closing(self._board):
            self.flush()


def _append(file: str, line: bytes) -> None:
    """The whole line or nothing: another would be joined to half of one."""
    with naming_full_disk(file), open(file, "ab", buffering=0) as log:
        size = log.tell()
        try:
            while line:
                line = line[log.write(line) :]
        except OSError:
            log.truncate(size)
            raise


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record) + "\n").encode()


class Window:
    """What one worker measures between two logged steps, by the clock on the wall; time :meth:`paused` is no part of a step."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self._start_anew()

    def _start_anew(self) -> None:
        self._start = perf_counter()
        self._steps, self._wait_s, self._paused_s, self._bytes_read, self._bytes_used = 0, 0.0, 0.0, 0, 0

    def wait_for_data(self) -> None:
        self._asked = perf_counter()

    def got_data(self, *, bytes_read: int, bytes_used: int) -> None:
        """:param bytes_read: from storage for this batch. :param bytes_used: of encoded pictures in it."""
        self._wait_s += perf_counter() - self._asked
        self._bytes_read += bytes_read
        self._bytes_used += bytes_used

    def stepped(self) -> None:
        self._steps += 1

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what holds the training up to save a checkpoint."""
        begun = perf_counter()
        try:
            yield
        finally:
            self._paused_s += perf_counter() - begun

    def read(self) -> dict[str, float]:
        """The numbers since the last call, after at least one step; then start anew.

        Means over the steps: ``step_s``, and of it ``data_wait_s`` waiting for a batch; ``data_wait_share`` is the one by the other.
        ``samples_per_s`` is of all workers together. Of this worker alone: ``bytes_read`` from storage and ``bytes_used`` of them in
        batches (sums), ``read_mb_per_s``, ``rss_mb`` of memory now (Linux) and ``gpu_memory_mb``, the most that tensors ever took (CUDA).
        ``checkpoint_s`` held up by checkpoints, where there was one. MB are 1e6 bytes.
        """
        assert self._steps, "no step since the last line"
        spent_s = perf_counter() - self._start - self._paused_s
        numbers = {
            "step_s": spent_s / self._steps,
            "data_wait_s": self._wait_s / self._steps,
            "data_wait_share": self._wait_s / spent_s,
            "samples_per_s": self._global_batch * self._steps / spent_s,
            "bytes_read": self._bytes_read,
            "bytes_used": self._bytes_used,
            "read_mb_per_s": self._bytes_read / 1e6 / spent_s,
            **_memory_mb(),
            **({"checkpoint_s": self._paused_s} if self._paused_s else {}),
        }
        self._start_anew()
        return numbers


def _memory_mb() -> dict[str, float]:
    import torch  # readers of the log do not need it

    numbers = {}
    statm = Path("/proc/self/statm")
    if statm.exists():
        numbers["rss_mb"] = int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
    if torch.cuda.is_initialized():
        numbers["gpu_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return numbers
