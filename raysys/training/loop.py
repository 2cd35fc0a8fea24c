"""The training loop of one worker: resume, step, log, checkpoint, and at the end an open_clip folder.

Runs under Ray Train and in a plain process alike: what it needs of its host is a rank, a world size and a device.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from raysys.config import TrainConfig
from raysys.corpus.index import SampleIndex
from raysys.corpus.order import Order
from raysys.models import LoadedModel, load_model, save_open_clip_folder
from raysys.storage import join
from raysys.training import checkpoint
from raysys.training.ingest import BatchReader
from raysys.training.metrics import MetricsLog
from raysys.training.step import TrainStep


@dataclass
class Host:
    """Where a worker runs."""

    rank: int
    world_size: int
    device: torch.device


def run_worker(cfg: TrainConfig, run: str, index: SampleIndex, host: Host, *, threads: int) -> None:
    """Train from the newest checkpoint of ``run`` (or from the start) to ``train.steps``.

    :param threads: CPU threads of this worker's tensor operations.
    """
    if host.device.type == "cpu":
        torch.set_num_threads(threads)
    torch.manual_seed(cfg.seed)
    loaded = load_model(cfg.model, cfg.pretrained)
    size_px = image_size(loaded)
    step_fn = TrainStep(
        loaded.model,
        mean=loaded.preprocess_cfg["mean"],
        std=loaded.preprocess_cfg["std"],
        loop=cfg.train,
        optim=cfg.optim,
        device=host.device,
        rank=host.rank,
        world_size=host.world_size,
    )
    first = _resume(run, step_fn)
    reader = BatchReader(
        index,
        Order(len(index), cfg.global_batch, cfg.seed, cfg.augment.factor),
        cfg.augment,
        loaded.tokenizer,
        size_px=size_px,
        rank=host.rank,
        world_size=host.world_size,
        threads=cfg.train.decode_threads,
        prefetch=cfg.train.prefetch_batches,
    )
    log = MetricsLog(run, first_step=first) if host.rank == 0 else None
    _train(cfg, run, reader, step_fn, host, log, first)
    if log is not None:
        log.close()
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in step_fn.model.state_dict().items()}
        save_open_clip_folder(join(run, "open_clip"), config=loaded.config, preprocess_cfg=loaded.preprocess_cfg, state_dict=state)


def image_size(loaded: LoadedModel) -> int:
    """Side of the model's pictures, pixels."""
    size = loaded.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def _resume(run: str, step_fn: TrainStep) -> int:
    """Load the newest checkpoint; returns how many steps are done."""
    state = checkpoint.load_newest(run)
    if state is None:
        return 0
    step_fn.model.load_state_dict(state["model"])
    step_fn.optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def _train(
    cfg: TrainConfig, run: str, reader: BatchReader, step_fn: TrainStep, host: Host, log: MetricsLog | None, first: int
) -> None:
    loop = cfg.train
    window = _Window(cfg.global_batch)
    batches = reader.batches(first, loop.steps)
    for step in range(first, loop.steps):
        window.wait_for_data()
        batch = next(batches)
        window.got_data(batch.bytes_read)
        # Dropout and patch dropout draw from a stream of the step, so a resumed run draws the same.
        torch.manual_seed((cfg.seed << 32) ^ (step * host.world_size + host.rank))
        done = step + 1
        measure = done % loop.log_every == 0 or done == loop.steps or step == first
        metrics = step_fn(batch.images, batch.texts, step=step, measure=measure)
        window.stepped()
        if measure and log is not None:
            log.write(done, metrics | window.read())
        elif measure:
            window.read()
        if done % loop.checkpoint_every == 0 or done == loop.steps:
            if host.rank == 0:
                state = {"step": done, "model": step_fn.model.state_dict(), "optimizer": step_fn.optimizer.state_dict()}
                checkpoint.save(run, done, state, keep=loop.keep_checkpoints)
            window.forget()


class _Window:
    """Times since the last logged step."""

    def __init__(self, global_batch: int) -> None:
        self._global_batch = global_batch
        self.forget()

    def forget(self) -> None:
        """Start anew (a checkpoint is no part of a step)."""
        self._start = time.perf_counter()
        self._steps, self._wait_s, self._bytes = 0, 0.0, 0

    def wait_for_data(self) -> None:
        self._asked = time.perf_counter()

    def got_data(self, size: int) -> None:
        self._wait_s += time.perf_counter() - self._asked
        self._bytes += size

    def stepped(self) -> None:
        self._steps += 1

    def read(self) -> dict[str, float]:
        step_s = (time.perf_counter() - self._start) / max(self._steps, 1)
        numbers = {
            "step_s": step_s,
            "data_wait_s": self._wait_s / max(self._steps, 1),
            "samples_per_s": self._global_batch / step_s,
            "megabytes_read": self._bytes / 1e6,
        }
        self.forget()
        return numbers
