"""The training loop of one worker: resume, step, log, checkpoint, validate, and at the end an open_clip folder.

Runs under Ray Train and in a plain process alike: what it needs of its host is a rank, a world size and a device.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from raysys.config import TrainConfig
from raysys.corpus.index import SampleIndex
from raysys.corpus.order import Order
from raysys.errors import UserError, WorkFailed
from raysys.masking import mask
from raysys.models import LoadedModel, save_open_clip_folder
from raysys.patience import explained, is_final
from raysys.storage import join, read_json
from raysys.training import checkpoint
from raysys.training.augment import strength_at
from raysys.training.card import library_versions, model_card
from raysys.training.compiler import find_compiler
from raysys.training.cpu import fast_precision
from raysys.training.flops import Utilisation, flops_per_sample, peak_tflops
from raysys.training.group import Group
from raysys.training.ingest import Batch, BatchReader
from raysys.training.lock import LostLock, RunLock
from raysys.training.metrics import MetricsLog, Window, read_metrics
from raysys.training.model import count_parameters, training_model
from raysys.training.samples import order_of
from raysys.training.step import TrainStep, batch_norm_warning
from raysys.training.validation import SCORE, Validation, Validator
from raysys.training.views import views_of


@dataclass
class Host:
    """Where a worker runs."""

    rank: int
    world_size: int
    device: torch.device
    say: Callable[[str], None]
    """Shows the user a line; rank 0 calls it."""
    validator: Validator | None
    """Answers rank 0; the same on all workers whether there is one."""


class StoppedByPeer(RuntimeError):
    """Another worker of the group raised the error that ends the run."""


class Diverged(WorkFailed):
    """The loss, its gradient or the weights are not finite numbers any more."""


def run_worker(cfg: TrainConfig, run: str, index: SampleIndex, host: Host, lock: RunLock, *, threads: int) -> None:
    """Train from the newest checkpoint of ``run`` (or from the start) to the last step.

    :param lock: the driver's.
    :param threads: CPU threads of this worker's tensor operations.
    :raises UserError: in the worker that met it, LostLock where the run was taken over; :class:`StoppedByPeer` in all others.
    :raises Diverged: in rank 0; :class:`StoppedByPeer` in all others.
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
        if cfg.train.compile:
            _require_compiler(host.device)
        torch.manual_seed(cfg.seed)
        loaded = training_model(cfg)
        if host.rank == 0 and host.validator is not None:
            host.validator.set_model(deepcopy(loaded))
    utilisation = _utilisation(cfg, loaded, host)
    # All go on from the step that rank 0 found while it had the lock: a zombie may still publish a checkpoint between two listings.
    first = int(group.sum(torch.tensor(first, device=host.device)))
    loop = replace(cfg.train, micro_batch=_micro_batch(cfg, order))
    step_fn = TrainStep(
        loaded.model,
        mean=loaded.preprocess_cfg["mean"],
        std=loaded.preprocess_cfg["std"],
        loss=cfg.loss,
        freeze_bn_stats=cfg.towers.lock_image_freeze_bn_stats,
        loop=loop,
        optim=cfg.optim,
        device=host.device,
        group=group,
        steps=cfg.num_steps,
    )
    with together.all_or_none():
        if first:
            step_fn.load_state(checkpoint.load(run, first))
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
                writer = stack.enter_context(closing(_Writer(cfg, run, lock, first, host, utilisation)))
                if not first:
                    samples, _ = order.batch(0, host.rank, host.world_size)
                    views = views_of(samples, index, order, cfg.augment, size_px=image_size(loaded), num_steps=cfg.num_steps)
                    writer.show_data(len(index) / index.num_samples_before, views)
        if first and _validates(cfg, first):
            weights = step_fn.model_state()
            with together.later():
                if writer is not None:
                    writer.validate(first, weights)  # unless it was, before the run was stopped
        batches = stack.enter_context(closing(reader.batches(first, cfg.num_steps)))
        _train(cfg, batches, step_fn, group, host, together, writer, first)
        with together.all_or_none():
            if writer is not None:
                writer.close()
    weights = step_fn.model_state()
    with together.all_or_none():
        if host.rank == 0:
            lock.check()
            save_open_clip_folder(join(run, "open_clip"), loaded, state_dict=weights, card=_card(cfg, loaded, index, run))


def _require_compiler(device: torch.device) -> None:
    """:raises UserError: where this machine has no compiler for the device."""
    found, which = find_compiler(device.type)
    if found is None:
        raise UserError(
            f"train.compile=true: {which} is not there on {socket.gethostname()}; install it on every node, or leave the key out"
        )


def image_size(loaded: LoadedModel) -> int:
    """Side of the model's pictures, pixels."""
    size = loaded.preprocess_cfg["size"]
    return int(size if isinstance(size, int) else size[0])


def context_length(loaded: LoadedModel) -> int:
    """Tokens of the model's texts."""
    return int(loaded.config["text_cfg"].get("context_length", 77))  # open_clip's default


def _card(cfg: TrainConfig, loaded: LoadedModel, index: SampleIndex, run: str) -> str:
    """The model card of a run that is done."""
    lines = read_metrics(run)
    results: dict[str, dict[str, float]] = {}
    for name, value in lines[-1].items():
        if name.startswith("val/") and name != SCORE:
            _, a_set, metric = name.split("/", 2)
            results.setdefault(a_set, {})[metric] = value
    policy = {}
    if cfg.selection is not None:
        policy = read_json(join(cfg.selection, "settings.json"))["settings"]["policy"]
    elif cfg.annotations is not None:
        policy = asdict(cfg.policy)
    return model_card(
        replace(cfg, model=loaded.name),
        start=loaded.pretrained,
        parameters=count_parameters(loaded.model),
        samples=index.num_samples_before,
        kept=len(index),
        reasons=index.reasons,
        policy=policy,
        results=results,
        versions=library_versions(),
    )


def _micro_batch(cfg: TrainConfig, order: Order) -> int | None:
    """Where the number of workers may shrink, no worker's memory may grow: at most its share of the largest group goes at once."""
    fewest, most = cfg.worker_range
    if cfg.train.micro_batch is None and fewest < most:
        return max(order.sizes(most))
    return cfg.train.micro_batch


def _validates(cfg: TrainConfig, done: int) -> bool:
    """Whether the model is validated after ``done`` steps."""
    every = cfg.train.validate_every
    return bool(cfg.evaluators) and (done == cfg.num_steps or (every is not None and done % every == 0))


def _utilisation(cfg: TrainConfig, loaded: LoadedModel, host: Host) -> Utilisation:
    """Of the model as it is before workers share it. Says what is trained."""
    trained, total = count_parameters(loaded.model)
    flops = flops_per_sample(loaded.model, image_size(loaded), context_length(loaded))
    peak = cfg.train.peak_tflops
    if peak is None and host.device.type == "cuda" and cfg.train.precision == "amp_bf16":
        peak = peak_tflops(torch.cuda.get_device_name(host.device))
    what = f"{total / 1e6:.1f}M parameters" + (f", {trained / 1e6:.1f}M of them trained" if trained < total else "")
    work = f"{flops / 1e9:.3g}" if flops is not None else "uncounted"
    if host.rank == 0 and host.device.type == "cpu" and cfg.train.precision == "amp_bf16" and fast_precision() == "fp32":
        host.say("this CPU has no instructions for bfloat16 (AVX512_BF16, AMX): train.precision=fp32 is many times as fast here")
    if host.rank == 0:
        host.say(f"{what}, {work} GFLOPs a sample; starts from {mask(loaded.pretrained)} weights")
    return Utilisation(flops, peak)


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
        validates = _validates(cfg, done)
        saves = done % loop.checkpoint_every == 0 or done == steps or agreed.flag or validates
        measure = done % loop.log_every == 0 or done == steps or step == 0 or validates
        metrics = step_fn(batch.images, batch.texts, step=step, measure=measure)
        window.stepped()
        if measure or saves:
            bad_step = step_fn.first_bad_step(check_weights=saves)
            if bad_step is not None:
                raise StoppedByPeer(f"diverged at step {bad_step}") if writer is None else writer.diverged(bad_step)
        if measure:
            measured = _over_workers(group, window.read(), host.device)
            told = {"augmentation_strength": strength_at(cfg.augment, step / steps), "num_workers": group.world_size}
            numbers = metrics | told | measured
            with together.later():
                if writer is not None:
                    writer.write(done, numbers)
        if saves:
            loss = step_fn.take_mean_loss()
            with window.paused():
                state = step_fn.state()
                with together.later():
                    if writer is not None:
                        writer.save(done, state, loss)
                        if validates:
                            writer.validate(done, state["state_dict"])


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
        except OSError as error:
            if not is_final(error):
                raise
            self._failure = explained(error)


class _Writer:
    """What rank 0 writes."""

    def __init__(self, cfg: TrainConfig, run: str, lock: RunLock, first: int, host: Host, utilisation: Utilisation) -> None:
        loop = cfg.train
        self._run, self._num_workers, self._utilisation = run, host.world_size, utilisation
        self._log = MetricsLog(run, lock, first_step=first)
        self._validation: Validation | None = None
        if host.validator is not None:
            answered = {line["step"]: line[SCORE] for line in read_metrics(run) if SCORE in line}
            self._validation = Validation(host.validator, self._log, host.say, answered=answered)
        self._checkpoints = checkpoint.CheckpointWriter(
            run,
            lock,
            keep=loop.keep_checkpoints,
            keep_best=loop.keep_best,
            scores=self._validation.scores if self._validation else None,
        )
        self._every_s = 60 * loop.checkpoint_minutes if loop.checkpoint_minutes else None
        self._saved = time.monotonic()
        self._closed = False

    def is_due(self) -> bool:
        """Whether the clock asks for a checkpoint."""
        return self._every_s is not None and time.monotonic() - self._saved > self._every_s

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A line of the log, and of the validation whose answer has come."""
        self._log.write(step, numbers | self._utilisation.metrics(numbers["samples_per_s"] / self._num_workers))
        if self._validation is not None:
            self._validation.take_answer(wait=False)

    def show_data(self, kept_share: float, views: dict[str, list[np.ndarray]]) -> None:
        """What the run is about to see, for TensorBoard."""
        self._log.show(0, {"data/kept_share": kept_share}, views)

    def save(self, step: int, state: dict[str, Any], loss: float) -> None:
        self._log.flush()
        self._checkpoints.save(step, {"step": step, **state}, loss=loss)
        self._saved = time.monotonic()

    def validate(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """Ask how good the weights are, unless that is known."""
        if self._validation is not None and step not in self._validation.scores:
            self._validation.ask(step, weights)

    def diverged(self, step: int) -> Diverged:
        """What to raise, when all that is good is written."""
        self.close()
        there = checkpoint.steps_there(self._run)
        last = (
            f"the last good checkpoint is {mask(join(self._run, 'checkpoints'))}/step-{there[-1]}"
            if there
            else "no checkpoint was due before"
        )
        return Diverged(
            f"the loss, its gradient or the weights are not finite at step {step}; {last}; begin a new run (another output) with a smaller optim.lr, "
            "more optim.warmup_steps or optim.grad_clip_norm=1"
        )

    def close(self) -> None:
        """Until all is written and answered; a second call does nothing."""
        if not self._closed:
            self._closed = True
            if self._validation is not None:
                self._validation.take_answer(wait=True)
            self._checkpoints.close()
            self._log.close()
