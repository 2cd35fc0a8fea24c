"""The training loop of one worker: resume, step, log, checkpoint, and at the end an open_clip folder.

Runs under Ray Train and in a plain process alike: what it needs of its host is a rank, a world size and a device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from raysys.config import TrainConfig
from raysys.corpus.index import SampleIndex
from raysys.corpus.order import Order
from raysys.models import LoadedModel, load_model, save_open_clip_folder
from raysys.storage import UserError, join
from raysys.training import checkpoint
from raysys.training.augment import strength_at
from raysys.training.group import Group
from raysys.training.ingest import Batch, BatchReader
from raysys.training.lock import LostLock, RunLock
from raysys.training.metrics import MetricsLog, Window
from raysys.training.samples import order_of
from raysys.training.step import TrainStep, batch_norm_warning


@dataclass
class Host:
    """Where a worker runs."""

    rank: int
    world_size: int
    device: torch.device
    say: Callable[[str], None]
    """Shows the user a line; rank 0 calls it."""


class StoppedByPeer(RuntimeError):
    """Another worker of the group raised the error that ends the run."""


def run_worker(cfg: TrainConfig, run: str, index: SampleIndex, host: Host, lock: RunLock, *, threads: int) -> None:
    """Train from the newest checkpoint of ``run`` (or from the start) to the last step.

    :param lock: the driver's.
    :param threads: CPU threads of this worker's tensor operations.
    :raises UserError: in the worker that met it, LostLock where the run was taken over; :class:`StoppedByPeer` in all others.
    """
    if host.device.type == "cpu":
        torch.set_num_threads(threads)
    order, first = order_of(cfg, index), 0
    group = Group(host.rank, order.sizes(host.world_size))
    together = _Together(group)
    with together.all_or_none():
        if host.rank == 0:
            lock = lock.attempt()
            first = (checkpoint.steps_there(run) or [0])[-1]
        torch.manual_seed(cfg.seed)
        loaded = load_model(cfg.model, cfg.pretrained)
    # All go on from the step that rank 0 found while it had the lock: a zombie may still publish a checkpoint between two listings.
    first = int(group.sum(torch.tensor(first, device=host.device)))
    loop = replace(cfg.train, micro_batch=_micro_batch(cfg, order))
    step_fn = TrainStep(
        loaded.model,
        mean=loaded.preprocess_cfg["mean"],
        std=loaded.preprocess_cfg["std"],
        loop=loop,
        optim=cfg.optim,
        device=host.device,
        group=group,
        steps=cfg.num_steps,
    )
    with together.all_or_none():
        if first:
            _resume(checkpoint.load(run, first), step_fn)
    reader = BatchReader(
        index,
        order,
        cfg.augment,
        loaded.tokenizer,
        size_px=image_size(loaded),
        num_steps=cfg.num_steps,
        rank=host.rank,
        world_size=host.world_size,
        read_threads=loop.read_threads,
        decode_threads=loop.decode_threads,
        prefetch=loop.prefetch_batches,
        pin_memory=host.device.type == "cuda",
    )
    warning = batch_norm_warning(loaded.model, group, loop.micro_batch)
    if warning and host.rank == 0:
        host.say(warning)
    with ExitStack() as stack:
        writer: _Writer | None = None
        with together.all_or_none():
            if host.rank == 0:
                writer = stack.enter_context(closing(_Writer(cfg, run, lock, first)))
        batches = stack.enter_context(closing(reader.batches(first, cfg.num_steps)))
        _train(cfg, batches, step_fn, group, host, together, writer, first)
        with together.all_or_none():
            if writer is not None:
                writer.close()
    with together.all_or_none():
        if host.rank == 0:
            lock.check()
            state = {name: tensor.detach().cpu().contiguous() for name, tensor in step_fn.model.state_dict().items()}
            folder = join(run, "open_clip")
            save_open_clip_folder(folder, config=loaded.config, preprocess_cfg=loaded.preprocess_cfg, state_dict=state)


def image_size(loaded: LoadedModel) -> int:
    """Side of the model's pictures, pixels."""
    size = loaded.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def _micro_batch(cfg: TrainConfig, order: Order) -> int | None:
    """Where the number of workers may shrink, no worker's memory may grow: at most its share of the largest group goes at once."""
    fewest, most = cfg.worker_range
    if cfg.train.micro_batch is None and fewest < most:
        return max(order.sizes(most))
    return cfg.train.micro_batch


def _resume(state: dict[str, Any], step_fn: TrainStep) -> None:
    step_fn.model.load_state_dict(state["model"])
    step_fn.optimizer.load_state_dict(state["optimizer"])


def _train(
    cfg: TrainConfig,
    batches: Generator[Batch, None, None],
    step_fn: TrainStep,
    group: Group,
    host: Host,
    together: _Together,
    writer: _Writer | None,
    first: int,
) -> None:
    loop, steps = cfg.train, cfg.num_steps
    window = Window(cfg.global_batch)
    for step in range(first, steps):
        done = step + 1
        due = writer is not None and writer.is_due()
        with together.all_or_none(due) as agreed:
            window.wait_for_data()
            batch = next(batches)
            window.got_data(bytes_read=batch.bytes_read, bytes_used=batch.bytes_used)
        # Dropout and patch dropout draw from a stream of the step, so a resumed run draws the same.
        torch.manual_seed((cfg.seed << 32) ^ (step * group.world_size + group.rank))
        measure = done % loop.log_every == 0 or done == steps or step == 0
        metrics = step_fn(batch.images, batch.texts, step=step, measure=measure)
        window.stepped()
        if measure:
            measured = _over_workers(group, window.read(), host.device)
            told = {"augmentation_strength": strength_at(cfg.augment, step / steps), "num_workers": group.world_size}
            numbers = metrics | told | measured
            with together.later():
                if writer is not None:
                    writer.log.write(done, numbers)
        if done % loop.checkpoint_every == 0 or done == steps or agreed.flag:
            loss = step_fn.take_mean_loss()
            if writer is not None:
                with together.later(), window.paused():
                    state = {"step": done, "model": step_fn.model.state_dict(), "optimizer": step_fn.optimizer.state_dict()}
                    writer.save(done, state, loss)


def _over_workers(group: Group, numbers: dict[str, float], device: torch.device) -> dict[str, float]:
    """What each worker measured -> one line: bytes and MB/s are sums, of all else the mean; alike on all workers."""
    names = sorted(numbers.keys() - {"checkpoint_s"})  # rank 0 alone has that
    sums = group.sum(torch.tensor([numbers[name] for name in names], dtype=torch.float64, device=device)).tolist()
    added = ("bytes_read", "bytes_used", "read_mb_per_s")
    whole = {name: value if name in added else value / group.world_size for name, value in zip(names, sums, strict=True)}
    return numbers | whole


@dataclass
class _Agreed:
    flag: bool = False


class _Together:
    """Workers end together: one that stopped by itself would leave the others waiting for it, and Ray would start all of them again."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._failure: Exception | None = None

    @contextmanager
    def all_or_none(self, flag: bool = False) -> Iterator[_Agreed]:
        """All workers do this block and learn at its end whether one of them failed in it, or raises the flag."""
        agreed = _Agreed()
        with self.later():
            yield agreed
        failed, agreed.flag = self._group.any_of(self._failure is not None, flag)
        if self._failure is not None:
            raise self._failure
        if failed:
            raise StoppedByPeer("another worker met the error that ends the run")

    @contextmanager
    def later(self) -> Iterator[None]:
        """What fails in this block is told at the end of the next :meth:`all_or_none`."""
        try:
            yield
        except (UserError, LostLock) as error:
            self._failure = error


class _Writer:
    """What rank 0 writes."""

    def __init__(self, cfg: TrainConfig, run: str, lock: RunLock, first: int) -> None:
        loop = cfg.train
        self.log = MetricsLog(run, lock, first_step=first)
        self._checkpoints = checkpoint.CheckpointWriter(run, lock, keep=loop.keep_checkpoints, keep_best=loop.keep_best)
        self._every_s = 60 * loop.checkpoint_minutes if loop.checkpoint_minutes else None
        self._saved = time.monotonic()
        self._closed = False

    def is_due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self._every_s is not None and time.monotonic() - self._saved > self._every_s

    def save(self, step: int, state: dict[str, object], loss: float) -> None:
        self.log.flush()
        self._checkpoints.save(step, state, loss=loss)
        self._saved = time.monotonic()

    def close(self) -> None:
        """Until all is written; a second call does nothing."""
        if not self._closed:
            self._closed = True
            self._checkpoints.close()
            self.log.close()
