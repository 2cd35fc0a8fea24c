"""A run's numbers: ``metrics.jsonl`` (one line a logged step) and TensorBoard, written by rank 0."""

from __future__ import annotations

import json
from typing import Any

from raysys.storage import exists, is_local, join, open_fs, read_bytes, write_bytes


def read_metrics(run: str) -> list[dict[str, Any]]:
    """Complete lines, in order; of a step that was logged twice the last."""
    path = join(run, "metrics.jsonl")
    if not exists(path):
        return []
    by_step: dict[int, dict[str, Any]] = {}
    for line in read_bytes(path).splitlines(keepends=True):
        if line.endswith(b"\n"):  # a line without its end is still being written
            record = json.loads(line)
            by_step[record["step"]] = record
    return [by_step[step] for step in sorted(by_step)]


class MetricsLog:
    def __init__(self, run: str, *, first_step: int) -> None:
        """Take up the log of a run that goes on at ``first_step``: what was logged past it is dropped."""
        from torch.utils.tensorboard import SummaryWriter  # readers of the log need neither torch nor TensorBoard

        self._path = join(run, "metrics.jsonl")
        self._lines = [json.dumps(record) + "\n" for record in read_metrics(run) if record["step"] <= first_step]
        write_bytes(self._path, "".join(self._lines).encode())
        self._board = SummaryWriter(join(run, "tensorboard"), purge_step=first_step) if is_local(run) else None

    def write(self, step: int, metrics: dict[str, float]) -> None:
        line = json.dumps({"step": step, **metrics}) + "\n"
        if is_local(self._path):
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(line)
        else:  # object stores know no append
            self._lines.append(line)
            fs, inner = open_fs(self._path)
            fs.pipe_file(inner, "".join(self._lines).encode())
        if self._board is not None:
            for name, value in metrics.items():
                self._board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
