"""``raysys train``: Ray Train starts the workers, survives their deaths, and each runs :func:`raysys.training.loop.run_worker`."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from raysys.cluster import num_cpus, ray_session, require
from raysys.config import TrainConfig
from raysys.corpus.index import SampleIndex
from raysys.models import check_model
from raysys.progress import Progress
from raysys.storage import Output, UserError, is_local, open_output, read_json, settings_of
from raysys.training import checkpoint
from raysys.training.loop import Host, run_worker
from raysys.training.metrics import read_metrics
from raysys.training.samples import choose_samples

CPUS_PER_WORKER = 0.9
"""Logical CPUs that a worker asks for; below 1, so that a sweep's trial and evaluator fit beside two workers on two cores."""


def train(cfg: TrainConfig) -> None:
    run = train_run(cfg)
    counts = read_json(run.join("manifest.json"))["counts"]
    loss = f"loss {counts['loss']:.3f}, " if "loss" in counts else ""
    print(
        f"train: {counts['steps']} steps of {counts['global_batch']}, {loss}{counts['samples_kept']} of {counts['samples']} samples kept"
    )
    print(f"result: {run.path}   (open_clip folder: {run.path}/open_clip, TensorBoard: {run.path}/tensorboard)")
    print(f"next:   raysys evaluate model={run.path} 'evaluators=[imagenet]' imagenet.path=FOLDER output=RESULTS")


def train_run(cfg: TrainConfig, *, concurrent_runs: int = 1) -> Output:
    """Train a run to its end, or take it up where it was left; sweep and demo call this too.

    :param concurrent_runs: runs that share the machine (their workers share its cores).
    :raises UserError: where words, corpus and cluster do not fit each other.
    """
    check_model(cfg.model, cfg.pretrained)
    index, evidence = choose_samples(cfg)
    settings = settings_of(cfg) | {"evidence": evidence}
    run = open_output(
        cfg.output, "train", settings, not_in_fingerprint=("num_workers", "use_gpu", "corpus", "annotations", "selection")
    )
    if run.finished:
        print(f"train: nothing is left to do, all {cfg.train.steps} steps are done")
        return run
    there = checkpoint.steps_there(run.path)
    if there:
        print(f"train: goes on after step {there[-1]} of {cfg.train.steps}")
    print(f"train: {len(index)} of {index.num_samples_before} samples are kept" + _reasons(index), flush=True)
    with ray_session(cfg.ray), _progress(run, cfg.train.steps, already=there[-1] if there else 0):
        _fit(cfg, run, index, concurrent_runs)
    metrics = read_metrics(run.path)
    counts = {
        "steps": cfg.train.steps,
        "global_batch": cfg.global_batch,
        "samples": index.num_samples_before,
        "samples_kept": len(index),
        "reasons": index.reasons,
        **({"loss": metrics[-1]["loss"]} if metrics else {}),
    }
    run.finish(counts, samples_per_s=_median([m["samples_per_s"] for m in metrics[1:]]))
    return run


def _reasons(index: SampleIndex) -> str:
    return "".join(f"; {number} dropped: {reason}" for reason, number in sorted(index.reasons.items(), key=lambda item: -item[1]))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _fit(cfg: TrainConfig, run: Output, index: SampleIndex, concurrent_runs: int) -> None:
    gpus = 1 if cfg.use_gpu else 0
    require(f"train with {cfg.num_workers} workers", cpus=cfg.num_workers * CPUS_PER_WORKER, gpus=cfg.num_workers * gpus)
    threads = max(1, num_cpus() // (cfg.num_workers * concurrent_runs))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"cfg": cfg, "run": run.path, "index": ray.put(index), "threads": threads},
        torch_config=TorchConfig(backend="nccl" if cfg.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=cfg.num_workers,
            use_gpu=cfg.use_gpu,
            resources_per_worker={"CPU": CPUS_PER_WORKER} | ({"GPU": 1} if gpus else {}),
        ),
        run_config=RunConfig(
            name="ray", storage_path=run.join("_ray"), failure_config=FailureConfig(max_failures=cfg.train.max_failures)
        ),
    )
    try:
        trainer.fit()
    except ray.train.TrainingFailedError as error:
        for cause in _causes(error):
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
        raise
    if is_local(run.path):
        shutil.rmtree(run.join("_ray"), ignore_errors=True)  # Ray's own state; ours is in checkpoints


def _causes(error: BaseException) -> Iterator[BaseException]:
    """What the workers died of."""
    for failure in getattr(error, "worker_failures", {}).values():
        yield getattr(failure, "cause", None) or failure


def _worker(config: dict[str, Any]) -> None:
    """What runs in each process of the group."""
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if config["cfg"].use_gpu else torch.device("cpu")
    host = Host(context.get_world_rank(), context.get_world_size(), device)
    run_worker(config["cfg"], config["run"], ray.get(config["index"]), host, threads=config["threads"])


@contextmanager
def _progress(run: Output, steps: int, *, already: int) -> Iterator[None]:
    """Show the run's progress while the workers write its log."""
    stop = threading.Event()

    def follow() -> None:
        progress, shown = Progress("train", steps, "steps", already=already), already
        while not stop.wait(2.0):
            lines = read_metrics(run.path)
            if lines and lines[-1]["step"] > shown:
                last = lines[-1]
                progress.advance(last["step"] - shown, note=f"loss {last['loss']:.3f}  {last['samples_per_s']:.0f} samples/s")
                shown = last["step"]
        progress.close()

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
