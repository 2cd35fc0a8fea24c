"""Checkpoints of a run: ``R/checkpoints/step-N/state.pt`` and ``info.json``, written beside the training, the newest few and the best kept.

In: nested state of model and optimiser. Out: the same on the CPU. The state is exact without more: the order of samples, their views
and every random draw are functions of (seed, step), so no stream of random numbers is stored.

``info.json`` (step, mean loss since the checkpoint before, time) is written last, and removed first: a checkpoint is complete, and seen by
:func:`steps_there`, where both files are there. Who may write is left to :mod:`raysys.training.lock`.
"""

from __future__ import annotations

import copy
import json
import math
import pickle
import re
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import torch

from raysys.errors import UserError
from raysys.masking import mask
from raysys.storage import join, list_names, read_bytes, reading, remove_file, remove_folder, write_new_json, writing
from raysys.training.lock import RunLock


def steps_there(run: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    return [step for step in _folders(run) if {"state.pt", "info.json"} <= set(list_names(_path(run, step)))]


def load(run: str, step: int) -> dict[str, Any]:
    """The state after ``step`` steps, tensors on the CPU.

    :raises UserError: where the file cannot be read.
    :raises FileNotFoundError: where it is not there (any more): removed, or written anew while it was read.
    """
    file = _path(run, step, "state.pt")
    try:
        with reading(file) as opened:
            return torch.load(opened, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, ValueError, LookupError, pickle.UnpicklingError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{mask(file)}: cannot be read ({type(error).__name__}: {reason}); "
            f"remove the folder step-{step} to go on from the checkpoint before it"
        ) from error


def load_newest(run: str) -> dict[str, Any] | None:
    """:func:`load` of the newest complete checkpoint; None where there is none. An older one is never taken silently."""
    for last in [False] * 4 + [True]:
        steps = steps_there(run)
        try:
            return load(run, steps[-1]) if steps else None
        except FileNotFoundError:  # a writer has removed or replaced it since: another is the newest now
            if last:
                raise
    raise AssertionError


class CheckpointWriter:
    """Writes the checkpoints of a run in a thread, one at a time, and removes old ones."""

    def __init__(
        self, run: str, lock: RunLock, *, keep: int, keep_best: bool, scores: Mapping[int, float | None] | None = None
    ) -> None:
        """
        :param keep: newest checkpoints that stay; with ``keep_best`` also the best of those there.
        :param scores: step -> the higher the better, None while that is being found out; the owner goes on filling it. The best is the
            one with the highest score, where any has one, else the one with the lowest loss.
        """
        assert keep >= 1, keep
        self._run, self._lock, self._keep, self._keep_best = run, lock, keep, keep_best
        self._scores = scores if scores is not None else {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._write_under_way: Future[None] | None = None

    def save(self, step: int, state: dict[str, Any], *, loss: float) -> None:
        """Copy the state as it is now to the CPU's memory and return; a thread writes it. Waits for the write before.

        :param step: optimisation steps done. Where its checkpoint is complete already, that one stays.
        :param state: nested dicts, lists and tuples of tensors, numbers and strings.
        :param loss: mean since the checkpoint before; NaN is never the best.
        :raises LostLock: from this call, or from the next or :meth:`wait`, where another has taken over the run.
        :raises TypeError: where ``state`` holds what :func:`load_newest` could not read.
        :raises OSError: from the next call or :meth:`wait`, where the file could not be written.
        """
        self.wait()
        self._lock.check()
        self._write_under_way = self._thread.submit(self._write, step, _copy_to_cpu(state), loss)

    def wait(self) -> None:
        """Until the last state is written. Raises what its thread raised."""
        under_way, self._write_under_way = self._write_under_way, None
        if under_way is not None:
            under_way.result()

    def close(self) -> None:
        """As :meth:`wait`; then what scores that came late have settled is removed, and the writer takes no more."""
        try:
            self.wait()
            if self._scores and steps_there(self._run):
                self._remove_old()
        finally:
            self._thread.shutdown()

    def _write(self, step: int, state: dict[str, Any], loss: float) -> None:
        if step not in steps_there(self._run):
            with writing(_path(self._run, step, "state.pt")) as file:
                torch.save(state, file)
                self._lock.check()  # where it raises, no file appears
            self._lock.check()  # the upload took its time
            now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            write_new_json(_path(self._run, step, "info.json"), {"step": step, "loss": loss, "time": now})
        self._remove_old()

    def _remove_old(self) -> None:
        """Complete checkpoints that are to stay no longer, and what killed writers left unfinished; never the newest, nor what is newer."""
        there = steps_there(self._run)
        stay = set(there[-self._keep :])
        if self._keep_best:
            scores = {step: self._scores[step] for step in there if step in self._scores}
            if scores:
                stay |= {step for step, score in scores.items() if score is None}
                ranked = [(-score, -step) for step, score in scores.items() if score is not None]
            else:
                ranked = [(loss, -step) for step in there if not math.isnan(loss := _loss(self._run, step))]
            stay |= {-step for _, step in sorted(ranked)[:1]}
        for step in _folders(self._run):
            if step < there[-1] and step not in stay:
                self._lock.check()
                remove_file(_path(self._run, step, "info.json"))
                remove_folder(_path(self._run, step))


def _path(run: str, *step_and_name: int | str) -> str:
    step, *name = step_and_name
    return join(run, "checkpoints", f"step-{step}", *map(str, name))


def _folders(run: str) -> list[int]:
    """Steps of which there is a folder, complete or not, ascending."""
    return sorted(int(name[5:]) for name in list_names(join(run, "checkpoints")) if re.fullmatch(r"step-\d+", name))


def _loss(run: str, step: int) -> float:
    with suppress(FileNotFoundError):  # a writer that has lost the lock removes its last
        return float(json.loads(read_bytes(_path(run, step, "info.json")))["loss"])
    return math.nan


def _copy_to_cpu(state: Any) -> Any:
    """The same nest with its own tensors in the CPU's memory, complete when it returns."""
    gpus: set[torch.device] = set()
    copied = _copy(state, gpus)
    for gpu in gpus:
        torch.cuda.synchronize(gpu)
    return copied


def _copy(value: Any, gpus: set[torch.device]) -> Any:
    """:param gpus: takes the devices on which copies are under way."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
        if not value.is_cuda:
            return value.to("cpu", copy=True)
        gpus.add(value.device)
        return torch.empty_like(value, device="cpu", pin_memory=True).copy_(value, non_blocking=True)
    if isinstance(value, dict):
        copied = copy.copy(value)  # a module's state_dict also carries its _metadata
        for key, item in value.items():
            copied[key] = _copy(item, gpus)
        return copied
    if type(value) in (list, tuple):
        return type(value)(_copy(item, gpus) for item in value)
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(
        f"a checkpoint holds tensors, dicts, lists, tuples, numbers and strings; {type(value)} could not be loaded again"
    )
