"""``raysys train``: Ray Train starts the workers, survives their deaths, and each runs :func:`raysys.training.loop.run_worker`."""

from __future__ import annotations

import math
import shlex
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import ray
import torch
from ray.train import FailureConfig, RunConfig, ScalingConfig, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer

from raysys.cluster import check_storage, make_room, num_cpus, on_this_node, ray_session, this_node, watched
from raysys.config import FREE_LOOP_KEYS, TrainConfig
from raysys.console import Progress, say, tell_result, warn
from raysys.corpus.index import SampleIndex
from raysys.corpus.shards import first_shards
from raysys.errors import UserError, WorkFailed
from raysys.evaluation.evaluator import SetConfig
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import (
    Asked,
    EvaluatorPool,
    Trained,
    bundles_beside,
    cpus_beside,
    evaluator_sets,
    files_of,
    inputs_of,
    pool_beside,
)
from raysys.masking import mask
from raysys.models import LoadedModel, portable
from raysys.output import Output, open_output, settings_of
from raysys.patience import explained, is_final
from raysys.room import Need
from raysys.storage import is_local, read_json, remove_folder
from raysys.training import checkpoint
from raysys.training.lock import LostLock, RunLock
from raysys.training.loop import Host, StoppedByPeer, run_worker
from raysys.training.metrics import read_metrics, read_newest_metrics
from raysys.training.model import check_training_model
from raysys.training.samples import check_evidence, choose_samples, order_of, weighted_sources
from raysys.training.validation import SCORE

CPUS_PER_WORKER = 0.9
"""Logical CPUs that a worker asks for; below 1, so that a sweep's trial and evaluator fit beside two workers on two cores. One with a GPU
asks for as many as it has threads that decode."""
PEER_LOST = ("gloo/transport", "DistBackendError")
"""In what torch says to a worker whose peer died, which Ray may hear of first."""
STATE_BYTES = 16
"""Of a worker for a parameter: weight, gradient and AdamW's two moments in fp32."""
QUESTIONS = ("evaluators", "imagenet", "imagenet_attr", "coco", "retrieval", "typographic", "service")
"""Words that say how a run is validated, not what it learns."""
NOT_LEARNT = ("num_workers", "use_gpu", "corpus", "annotations", "selection", "free", *QUESTIONS)
"""Of :func:`run_settings`, what a run may be taken up without."""


def train(cfg: TrainConfig) -> None:
    run = train_run(cfg)
    counts = read_json(run.join("manifest.json"))["counts"]
    loss = f"loss {counts['loss']:.3f}, " if "loss" in counts else ""
    say(
        f"train: {counts['steps']} steps of {counts['global_batch']}, {loss}{counts['samples_kept']} of {counts['samples']} samples kept"
    )
    place = mask(run.path)
    tell_result(
        place,
        model=f"{place}/open_clip",
        board=f"tensorboard --logdir {shlex.quote(place)}",
        next_words=f"raysys evaluate model={shlex.quote(place)} 'evaluators=[imagenet]' imagenet.path=FOLDER output=RESULTS",
    )


Heard = Callable[[int, dict[str, float]], bool]
"""Takes a validation (the step, and its line of metrics.jsonl) and says whether the run goes on."""


class StoppedEarly(WorkFailed):
    """Who listens to the run has ended it. Its arguments: the step of the validation, and its line."""


@dataclass(frozen=True)
class Surroundings:
    """What a run has in common with others, and who listens to it; by itself nothing and nobody."""

    concurrent_runs: int = 1
    """Runs that share the machine (their workers share its cores)."""
    pool: EvaluatorPool | None = None
    """Who validates; None: evaluators of the run's own."""
    evidence: str | None = None
    """Folder of the selection (or the index), which is made if it is not there; None: the run's own."""
    heard: Heard | None = None
    """Is told every validation once, those of earlier calls too, by a thread of its own; may end the run (:class:`StoppedEarly`)."""


def train_run(cfg: TrainConfig, around: Surroundings | None = None) -> Output:
    """Train a run to its end, or take it up where it was left; the trials of a sweep are this too.

    :raises UserError: where words, corpus and cluster do not fit each other.
    :raises WorkFailed: where the run diverges, or is stopped early.
    """
    alone, around = around is None, around or Surroundings()
    num_parameters = check_training_model(cfg)
    sets = evaluator_sets(cfg)[0] if around.pool is None else {}
    run = open_output(cfg.output, "train", run_settings(cfg), not_in_fingerprint=NOT_LEARNT)
    if run.finished:
        say(f"train: nothing is left to do, all {cfg.num_steps} steps are done")
        return run
    there = checkpoint.steps_there(run.path)
    lock = RunLock.take(run.path)
    try:
        index = choose_samples(cfg, around.evidence or run.path)
        _say_what_is_kept(cfg, index, there)
        with ray_session(cfg.ray):
            need = _need(cfg, index, sets, num_parameters)
            if alone:  # a sweep has looked, and waits for nodes that it loses
                make_room(need, cfg.ray.wait_minutes)
                check_storage(run.path, _inputs(cfg, sets, index))
            with watched(need):
                _fit(cfg, sets, run, index, lock, around, already=there[-1] if there else 0)
        lock.check()
    except LostLock as error:
        raise UserError(str(error)) from error
    except UserError:
        try:
            lock.check()
        except LostLock as error:
            raise UserError(str(error)) from error
        if not checkpoint.steps_there(run.path):
            run.forget()  # other words or files may mend it, and would be refused here
        raise
    metrics = read_metrics(run.path)
    counts = {
        "steps": cfg.num_steps,
        "global_batch": cfg.global_batch,
        "samples": index.num_samples_before,
        "samples_kept": len(index),
        "reasons": index.reasons,
        **({"loss": metrics[-1]["loss"]} if metrics else {}),
    }
    validation = {
        name.removeprefix("val/"): value for name, value in (metrics[-1] if metrics else {}).items() if name.startswith("val/")
    }
    facts = {"validation": validation} if validation else {}
    run.finish(counts, samples_per_s=_median([m["samples_per_s"] for m in metrics[1:] if "samples_per_s" in m]), **facts)
    remove_folder(run.join("lock"))
    return run


def worker_bundle(cfg: TrainConfig) -> dict[str, float]:
    """What a worker asks for."""
    return {"CPU": cfg.train.decode_threads, "GPU": 1} if cfg.use_gpu else {"CPU": CPUS_PER_WORKER}


def _need(cfg: TrainConfig, index: SampleIndex, sets: dict[str, SetConfig], num_parameters: int) -> Need:
    """Workers, and evaluators beside them. Of memory the least that it can be: the pictures of the windows, and on a CPU the weights."""
    fewest = cfg.worker_range[0]
    windows = min(cfg.order.lanes * cfg.order.window_mb * 1e6, float(index.size.sum())) / fewest
    weights = 0 if cfg.use_gpu else STATE_BYTES * num_parameters / (fewest if cfg.train.strategy == "fsdp" else 1)
    workers = [worker_bundle(cfg) | {"memory": windows + weights}] * fewest
    evaluators = [bundle | {"object_store_memory": 4 * num_parameters} for bundle in bundles_beside(cfg.service)] if sets else []
    beside = " and an evaluator beside them" if sets else ""
    return Need(f"train with {fewest} workers{beside}", [*workers, *evaluators])


def _inputs(cfg: TrainConfig, sets: dict[str, SetConfig], index: SampleIndex) -> dict[str, str]:
    """What every node must see."""
    evidence = {"annotations": index.rows_folder} | ({"selection": index.keep_folder} if index.keep_folder else {})
    return first_shards(index.roots, index.names.to_pylist()) | evidence | inputs_of(sets) | files_of(cfg.model, cfg.pretrained)


def _say_what_is_kept(cfg: TrainConfig, index: SampleIndex, there: list[int]) -> None:
    """:raises UserError: where a batch asks for more."""
    order = order_of(cfg, index)
    if there:
        say(f"train: goes on after step {there[-1]} of {cfg.num_steps}")
    say(f"train: {len(index)} of {index.num_samples_before} samples are kept" + _reasons(index))
    if len(order.shares) > 1:
        shares = zip(order.shares, weighted_sources(cfg.corpus), strict=True)
        say(f"train: of every batch {', '.join(f'{number} {name}' for number, name in shares)}")


def run_settings(cfg: TrainConfig) -> dict[str, Any]:
    """The words for settings.json, and the evidence; ``free`` are keys of ``train`` that change speed and safety only."""
    settings = settings_of(cfg) | {"evidence": check_evidence(cfg)}
    loop = settings["train"]
    settings["free"] = {key: loop.pop(key) for key in FREE_LOOP_KEYS}
    loop["steps"] = cfg.num_steps  # the same budget in other words is the same run
    del loop["samples_seen"]
    return settings


def _reasons(index: SampleIndex) -> str:
    return "".join(f"; {number} dropped: {reason}" for reason, number in sorted(index.reasons.items(), key=lambda item: -item[1]))


def _median(values: list[float]) -> float | None:
    return sorted(values)[len(values) // 2] if values else None


def _fit(
    cfg: TrainConfig,
    sets: dict[str, SetConfig],
    run: Output,
    index: SampleIndex,
    lock: RunLock,
    around: Surroundings,
    *,
    already: int,
) -> None:
    fewest, most = cfg.worker_range
    news = _News.options(scheduling_strategy=on_this_node()).remote()  # type: ignore[attr-defined]
    model, pretrained = portable(cfg.model, cfg.pretrained)  # workers run in a folder of Ray's
    of_workers = replace(cfg, model=model, pretrained=pretrained)
    own_pool = pool_beside(sets, cfg.service, threads=max(1, int(cpus_beside(cfg.service)))) if sets else None
    asked = around.pool or own_pool
    validator = _ServiceValidator(asked, cfg.ray.wait_minutes) if asked else None
    trainer = TorchTrainer(
        _worker,
        train_loop_config={
            "cfg": of_workers,
            "run": run.path,
            "index": ray.put(index),
            "lock": lock,
            "threads": max(1, num_cpus() // (most * around.concurrent_runs)),
            "news": news,
            "validator": validator,
        },
        torch_config=TorchConfig(backend="nccl" if cfg.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=fewest if fewest == most else (fewest, most),  # type: ignore[arg-type]  # Ray annotates the former one
            use_gpu=cfg.use_gpu,
            resources_per_worker=worker_bundle(cfg),
        ),
        run_config=RunConfig(
            name="ray", storage_path=run.join("_ray"), failure_config=FailureConfig(max_failures=cfg.train.max_failures)
        ),
    )
    with _progress(run, cfg.num_steps, news, already=already, heard=around.heard):
        try:
            trainer.fit()
        except WorkerGroupError as failure:
            raise _died(failure, cfg.train.max_failures) from failure
    error = ray.get(news.error.remote())
    ray.kill(news)
    if own_pool is not None:
        own_pool.close()
    if is_local(run.path):
        shutil.rmtree(run.join("_ray"), ignore_errors=True)  # Ray's own state; ours is in checkpoints
    if error is not None:
        raise error


def _died(error: WorkerGroupError, max_failures: int) -> Exception:
    """What the user is told when Ray gives up: workers that died again and again, or what one of them raised."""
    reasons = list(error.worker_failures.values())
    died = [str(reason).strip().splitlines()[0] for reason in reasons if isinstance(reason, ray.exceptions.RayError)]
    others = [reason for reason in reasons if not isinstance(reason, ray.exceptions.RayError)]
    if not all(any(words in str(reason) for words in PEER_LOST) for reason in others):
        return error
    last = died[0] if died else "the connection to one was lost"
    return WorkFailed(
        f"workers died {max_failures + 1} times, train.max_failures={max_failures} ({last}); the same words go on from the newest checkpoint"
    )


@ray.remote(num_cpus=0)
class _News:
    """What workers tell the driver beside Ray's own ways: an error that is raised makes Ray start all of them again."""

    def __init__(self) -> None:
        self._error: UserError | WorkFailed | None = None
        self._lines: list[str] = []

    def say(self, line: str) -> None:
        if line not in self._lines:  # each group of workers says it anew
            self._lines.append(line)

    def said(self) -> list[str]:
        return self._lines

    def tell(self, error: UserError | WorkFailed) -> None:
        self._error = self._error or error

    def error(self) -> UserError | WorkFailed | None:
        return self._error


class _ServiceValidator:
    """:class:`raysys.training.validation.Validator` by the evaluators' actors; it lives in rank 0."""

    def __init__(self, pool: EvaluatorPool, wait_minutes: float | None) -> None:
        self.pool = pool
        self._patience_s = math.inf if wait_minutes is None else 60 * wait_minutes
        self._blueprint: Any = None

    def set_model(self, blueprint: LoadedModel) -> None:
        self._blueprint = ray.put(blueprint)

    def ask(self, weights: dict[str, torch.Tensor]) -> Any:
        on_cpu = {name: tensor.detach().cpu() for name, tensor in weights.items()}
        return self.pool.ask(Trained(self._blueprint, ray.put(on_cpu)))

    def _wait(self, ticket: list[Asked]) -> bool:
        """Until all have answered; not longer than the patience for one that does not move: workers may hold what it needs to start again."""
        results, seen, moved = [asked.result for asked in ticket], None, time.monotonic()
        while len(ray.wait(results, num_returns=len(results), timeout=min(5.0, self._patience_s))[0]) < len(results):
            now = [self.pool.done(asked) for asked in ticket]
            if now != seen:
                seen, moved = now, time.monotonic()
            elif time.monotonic() - moved > self._patience_s:
                return False
        return True

    def answer(self, ticket: list[Asked], *, wait: bool) -> dict[str, float] | str | None:
        results = [asked.result for asked in ticket]
        there = len(ray.wait(results, num_returns=len(results), timeout=0)[0])
        if there < len(results) and not wait:
            return None
        try:
            if not self._wait(ticket):
                return f"the evaluator has not moved for {self._patience_s / 60:g} minutes; was its node lost?"
            of_sets = {result.evaluator: result.metrics for result in ray.get(results)}
        except ray.exceptions.RayError as error:  # the evaluator died, or its memory did not do: that is no end of a training
            return str(getattr(error, "cause", error)).strip().splitlines()[-1]
        scores = [metrics[PRIMARY[name]] for name, metrics in of_sets.items()]
        numbers = {
            f"val/{name}/{metric}": value
            for name, metrics in of_sets.items()
            for metric, value in metrics.items()
            if not metric.startswith("num_")
        }
        return {SCORE: sum(scores) / len(scores)} | numbers


def _worker(config: dict[str, Any]) -> None:
    """What runs in each process of the group."""
    context = ray.train.get_context()
    device = torch.device("cuda", torch.cuda.current_device()) if config["cfg"].use_gpu else torch.device("cpu")
    news = config["news"]
    of_node = int(this_node().total.get("CPU", 0)) // context.get_local_world_size()
    threads = max(1, min(config["threads"], of_node))
    host = Host(
        context.get_world_rank(), context.get_world_size(), device, lambda line: ray.get(news.say.remote(line)), config["validator"]
    )
    try:
        run_worker(config["cfg"], config["run"], ray.get(config["index"]), host, config["lock"], threads=threads)
    except (UserError, LostLock, WorkFailed) as error:  # trying again would not mend it
        ray.get(news.tell.remote(error if isinstance(error, WorkFailed) else UserError(str(error))))
    except OSError as error:
        if not is_final(error):
            raise
        ray.get(news.tell.remote(explained(error)))
    except StoppedByPeer:
        pass


@contextmanager
def _progress(run: Output, steps: int, news: Any, *, already: int, heard: Heard | None) -> Iterator[None]:
    """Show the run's progress, and what workers say, while they write its log; end the run where ``heard`` says so."""
    stop = threading.Event()
    told: set[int] = set()

    def tell(lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if heard is not None and SCORE in line and line["step"] not in told:
                told.add(line["step"])
                if not heard(line["step"], line) and not stop.is_set():
                    ray.get(news.tell.remote(StoppedEarly(line["step"], line)))
                    RunLock.take(run.path)  # workers lose the run at their next write, and end together

    def follow() -> None:
        shown, lines_heard, stopped = already, 0, False
        tell(read_metrics(run.path))
        while not stopped:
            stopped = stop.wait(2.0)  # and look once more at the end
            said = ray.get(news.said.remote())
            for line in said[lines_heard:]:
                warn(f"train: {line}")
            lines_heard = len(said)
            newest = read_newest_metrics(run.path)
            tell(newest)
            last = next((line for line in reversed(newest) if "loss" in line), None)
            if last is not None and last["step"] > shown:
                progress.advance(last["step"] - shown, note=f"loss {last['loss']:.3f}  {last['samples_per_s']:.0f} samples/s")
                shown = last["step"]
        tell(read_metrics(run.path))

    with Progress("train", steps, "steps", already=already) as progress:
        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
