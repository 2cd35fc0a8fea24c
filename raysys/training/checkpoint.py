"""Checkpoints: ``R/checkpoints/step-N/state.pt``, whole or not at all, the newest few kept.

A checkpoint holds model, optimiser and step; the order of samples and every random stream are functions of the step.
"""

from __future__ import annotations

import io
import re
from typing import Any

import torch

from raysys.storage import exists, join, open_fs, write_bytes


def steps_there(run: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    fs, folder = open_fs(join(run, "checkpoints"))
    if not fs.exists(folder):
        return []
    fs.invalidate_cache()
    names = [f.rstrip("/").rsplit("/", 1)[-1] for f in fs.ls(folder, detail=False)]
    steps = sorted(int(n[5:]) for n in names if re.fullmatch(r"step-\d+", n))
    return [s for s in steps if exists(_file(run, s))]


def save(run: str, step: int, state: dict[str, Any], *, keep: int) -> None:
    """Write the checkpoint of ``step`` optimisation steps done, then remove the oldest beyond ``keep``."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(_file(run, step), buffer.getvalue())
    for old in steps_there(run)[:-keep]:
        fs, folder = open_fs(join(run, "checkpoints", f"step-{old}"))
        fs.rm(folder, recursive=True)


def load_newest(run: str) -> dict[str, Any] | None:
    """The newest state, tensors on the CPU; None where there is none."""
    steps = steps_there(run)
    if not steps:
        return None
    fs, file = open_fs(_file(run, steps[-1]))
    with fs.open(file, "rb") as opened:
        return torch.load(io.BytesIO(opened.read()), map_location="cpu", weights_only=True)


def _file(run: str, step: int) -> str:
    return join(run, "checkpoints", f"step-{step}", "state.pt")
