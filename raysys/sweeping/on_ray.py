"""``raysys sweep``: Ray Tune over points and seeds; each trial is :func:`raysys.training.on_ray.train_run`, as in ``raysys train``.

In: a space, the words of train and of evaluate. Out: W/{results.parquet, front.json, best.yaml, tensorboard, trials/TRIAL, manifest.json}.
Annotations were made once, before; evaluation sets are decoded once, by one pool of evaluators that all trials ask. A trial whose
``result.json`` is there has ended; the same words take up every other one from its checkpoints. What is tried stands in
:mod:`raysys.sweeping.space` and :mod:`raysys.sweeping.search`, what comes out of it in :mod:`raysys.sweeping.results`.
"""

from __future__ import annotations

import contextlib
import io
import math
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysys.cluster import num_cpus, ray_session, require
from raysys.config import SweepConfig, TrainConfig
from raysys.corpus.shards import absolute_corpus, open_corpus
from raysys.evaluation.evaluator import SetConfig
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import EvaluatorPool, Spec, cpus_beside, evaluator_sets, num_actors_beside, pool_beside
from raysys.models import portable
from raysys.progress import Progress, duration
from raysys.storage import (
    Output,
    UserError,
    WorkFailed,
    absolute,
    exists,
    join,
    list_names,
    mask,
    open_output,
    read_json,
    remove_file,
    remove_folder,
    write_bytes,
    write_json,
)
from raysys.sweeping.results import PointResult, Row, best_point, points_of, row_of, table, write_hparams, write_tables
from raysys.sweeping.search import Tpe, trials_of
from raysys.sweeping.space import Point, Space, Trial, at_trial, check_space, draw, grid, group_contents, read_space
from raysys.training.lock import LostLock, RunLock
from raysys.training.metrics import read_metrics
from raysys.training.model import check_training_model
from raysys.training.on_ray import CPUS_PER_WORKER, NOT_LEARNT, run_settings, train_run
from raysys.training.validation import SCORE

TRIAL_CPUS = 0.01
"""A trial's driver only waits; Tune refuses 0."""
FREE = ("num_samples", "seeds", "max_concurrent", "measure_steps", "dry_run")
"""Keys that a sweep may be taken up without: the first two add trials."""


@dataclass(frozen=True)
class Job:
    """What a trial's process does."""

    name: str
    cfg: TrainConfig
    """Its words, its output among them; paths in it hold in any process."""


def sweep(cfg: SweepConfig) -> None:
    space = read_space(cfg.space)
    base, sets, fingerprints = _base(cfg)
    check_space(space, base, cfg.search)
    plan = Plan(cfg, base, space)
    plan.check()
    settings = run_settings(base) | {key: getattr(cfg, key) for key in ("search", "objective", *FREE)}
    settings |= {
        "space": space,
        "keys": list(space),
        "choices": group_contents(space),
        "sets": fingerprints,
        "precision": cfg.service.precision,
        "asha": asdict(cfg.asha),
    }
    output = open_output(cfg.output, "sweep", settings, not_in_fingerprint=(*NOT_LEARNT, *FREE))
    plan.take_up(output)
    num_decoded: dict[str, int] = {}
    if plan.num_open:
        with ray_session(cfg.ray):
            concurrent = _concurrent(cfg, base, plan.num_open)
            pool = pool_beside(sets, cfg.service, threads=num_cpus())
            _tell_cost(cfg, plan, output, pool, concurrent)
            if not cfg.dry_run:
                remove_file(output.join("manifest.json"))  # of fewer samples or seeds
                _run_trials(cfg, plan, output, pool, concurrent)
            num_decoded = pool.num_decoded()
            pool.close()
    else:
        print(f"sweep: nothing is left to do, all {len(plan.trials)} trials have ended")
    if cfg.dry_run:
        if list_names(output.path) == ["settings.json"]:
            output.forget()  # other words may come
        print("next:   the same words without dry_run=true")
        return
    _write_results(cfg, plan, output, num_decoded)


def _base(cfg: SweepConfig) -> tuple[TrainConfig, dict[str, SetConfig], dict[str, str]]:
    """The words of train; the evaluators' sets and their fingerprints."""
    base = TrainConfig(**{f.name: getattr(cfg, f.name) for f in fields(TrainConfig)})
    open_corpus(base.corpus)
    sets, fingerprints = evaluator_sets(cfg)
    return replace(base, evaluators=list(sets), **sets), sets, fingerprints  # type: ignore[arg-type]  # each set is a field of its name


def _anywhere(cfg: TrainConfig) -> TrainConfig:
    """With paths that hold in any process."""
    model, pretrained = portable(cfg.model, cfg.pretrained)
    return replace(
        cfg,
        corpus=absolute_corpus(cfg.corpus),
        annotations=absolute(cfg.annotations) if cfg.annotations else None,
        selection=absolute(cfg.selection) if cfg.selection else None,
        model=model,
        pretrained=pretrained,
    )


# ---- which trials -----------------------------------------------------------------------------------------------------


class Plan:
    """The trials, those that have ended and those to come."""

    def __init__(self, cfg: SweepConfig, base: TrainConfig, space: Space) -> None:
        self._cfg, self._base, self._space = cfg, base, space
        self.keys = list(space)
        self.objectives = [f"{name}/{PRIMARY[name]}" for name in base.evaluators]
        self._seeds = [cfg.seed + repeat for repeat in range(cfg.seeds)]
        self._tpe: Tpe | None = None
        points: list[Point] = []
        if cfg.search == "grid":
            points = grid(space)
        elif cfg.search == "random":
            points = [draw(space, cfg.seed, number) for number in range(cfg.num_samples or 0)]
        else:
            several = len(self.objectives) if cfg.objective == "front" else 1
            self._tpe = Tpe(space, seed=cfg.seed, num_objectives=several)
        self.trials = trials_of(points, self._seeds)
        """All that are known; tpe adds to them."""
        self._queue: deque[Trial] = deque()
        self._most = cfg.num_samples if self._tpe else len(points)

    def check(self) -> None:
        """:raises UserError: where a point can not be trained, before anything runs."""
        keys, base = self.keys, self._base
        if base.annotations is None and "annotations" not in keys and any(key.split(".")[0] == "policy" for key in keys):
            raise UserError("space: policy is swept, so annotations=FOLDER is needed (raysys annotate makes it, once)")
        alone = [
            Trial(Point(0, {k: value}), base.seed)
            for k, values in self._space.items()
            if isinstance(values, list)
            for value in values
        ]
        of_trials = [at_trial(base, trial, "") for trial in self.trials or alone or [Trial(Point(0, {}), base.seed)]]
        for of_trial in {repr((c.model, c.pretrained, c.loss, c.towers, c.train)): c for c in of_trials}.values():
            check_training_model(of_trial)

    def take_up(self, output: Output) -> None:
        """Go on with what an earlier call left: a point that it proposed, a trial that has ended."""
        self._output = output
        self.results: dict[str, dict[str, Any]] = {}
        if self._tpe:
            folder = output.join("points")
            files = sorted(list_names(folder)) if exists(folder) else []
            for number, file in enumerate(files):
                point = Point(number, read_json(join(folder, file)))
                self._tpe.take_up(point)
                self.trials += trials_of([point], self._seeds)
        for trial in self.trials:
            file = self.result_file(trial.name)
            if exists(file):
                self.results[trial.name] = read_json(file)
        self._queue.extend(trial for trial in self.trials if not self._ended(trial))
        for number in dict.fromkeys(trial.point.number for trial in self.trials):
            self._tell(number)

    def _ended(self, trial: Trial) -> bool:
        return self.results.get(trial.name, {"status": "crashed"})["status"] != "crashed"

    @property
    def num_open(self) -> int:
        """Trials that have not ended; of tpe also those that are not proposed yet."""
        unproposed = (self._most or 0) - len(self.trials) // len(self._seeds) if self._tpe else 0
        return len(self._queue) + max(unproposed, 0) * len(self._seeds)

    @property
    def num_trials(self) -> int:
        return max(self._most or 0, len(self.trials) // len(self._seeds)) * len(self._seeds)

    def result_file(self, trial: str) -> str:
        return self._output.join("trials", trial, "result.json")

    def job(self, trial: Trial) -> Job:
        return Job(trial.name, _anywhere(at_trial(self._base, trial, self._output.join("trials", trial.name))))

    def coming(self, most: int) -> list[Job]:
        """Some of the next trials, which stay to come."""
        there = list(self._queue)[:most]
        if not there and self._tpe:
            there = [Trial(draw(self._space, self._cfg.seed, number), self._cfg.seed) for number in range(most)]
        return [self.job(trial) for trial in there]

    def next(self) -> Job | None:
        """The next trial; None: that were all."""
        if not self._queue and self._tpe and self.num_open:
            point = self._tpe.propose()
            if point is None:
                return None
            write_json(self._output.join("points", f"{point.number:06d}.json"), point.values)
            self._queue.extend(trials_of([point], self._seeds))
            self.trials += trials_of([point], self._seeds)
        return self.job(self._queue.popleft()) if self._queue else None

    def ended(self, name: str, result: dict[str, Any]) -> None:
        self.results[name] = result
        self._tell(next(trial.point.number for trial in self.trials if trial.name == name))

    def _tell(self, number: int) -> None:
        """Tpe learns of a point when the last of its seeds has ended."""
        rows = self.rows(of_point=number)
        if self._tpe is None or any(row["status"] in ("missing", "crashed") for row in rows):
            return
        if all(row["status"] == "finished" for row in rows):
            [point] = points_of(rows, self.keys, self.objectives)
            assert point.score is not None
            means = tuple(point.objectives[name].mean for name in self.objectives)
            self._tpe.tell(number, means if self._cfg.objective == "front" else (point.score.mean,))
        elif all(row["status"] in ("finished", "stopped") for row in rows):
            self._tpe.tell(number, (statistics.fmean(row["score"] for row in rows),), stopped_at=min(row["steps"] for row in rows))
        else:
            self._tpe.tell(number, None)

    def rows(self, of_point: int | None = None) -> list[Row]:
        return [
            row_of(
                trial.name, trial.point.number, trial.seed, trial.point.values, self.results.get(trial.name),
                objectives=self.objectives, objective=self._cfg.objective,
            )
            for trial in sorted(self.trials, key=lambda trial: (trial.point.number, trial.seed))
            if of_point in (None, trial.point.number)
        ]  # fmt: skip

    def best(self, point: PointResult) -> TrainConfig:
        return _anywhere(at_trial(self._base, Trial(Point(point.number, point.values), self._cfg.seed), ""))

    def most_steps(self) -> int:
        """Of the trials that are known."""
        return max([at_trial(self._base, trial, "").num_steps for trial in self.trials] or [self._base.num_steps])


# ---- what it will cost ------------------------------------------------------------------------------------------------


def _concurrent(cfg: SweepConfig, base: TrainConfig, num_trials: int) -> int:
    """Trials at a time. :raises UserError: where the cluster has no room for them; Ray would wait in silence."""
    workers, actors = base.worker_range[1], num_actors_beside(cfg.service)
    of_trial = {"CPU": workers * CPUS_PER_WORKER + TRIAL_CPUS, "GPU": workers if base.use_gpu else 0}
    of_pool = {"CPU": actors * cpus_beside(cfg.service), "GPU": actors * cfg.service.num_gpus_per_actor}
    there = ray.cluster_resources()
    fit = min(int((there.get(kind, 0) - of_pool[kind]) / of_trial[kind] + 1e-9) for kind in of_trial if of_trial[kind])
    asked = min(cfg.max_concurrent or max(fit, 1), num_trials)
    trials = f"max_concurrent={asked} trials" if asked > 1 else "a trial"
    require(
        f"sweep: {trials} of {workers} workers beside {actors} evaluators",
        cpus=asked * of_trial["CPU"] + of_pool["CPU"],
        gpus=asked * of_trial["GPU"] + of_pool["GPU"],
    )
    return asked


def _tell_cost(cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, concurrent: int) -> None:
    """Trials, steps, samples, and the time that they take by a rehearsal or by the trials that have ended."""
    coming = plan.coming(plan.num_open)
    steps = sum(job.cfg.num_steps for job in coming) * plan.num_open // len(coming)
    samples = sum(job.cfg.num_steps * job.cfg.global_batch for job in coming) * plan.num_open // len(coming)
    ended = plan.num_trials - plan.num_open
    print(
        f"sweep: {plan.num_open} trials"
        + (f" ({ended} of {plan.num_trials} have ended already)" if ended else "")
        + f", {concurrent} at a time on {num_cpus()} CPUs: {steps:,} steps, {samples:,} samples"
        + (", less where asha ends trials early" if cfg.asha.grace_steps else ""),
        flush=True,
    )
    before = [r["seconds"] for r in plan.results.values() if r["status"] == "finished"]
    if before:
        of_trial, source = statistics.fmean(before), f"{len(before)} trials that have ended"
    elif cfg.measure_steps:
        rehearsal = _rehearse(cfg, plan, output, pool, concurrent)
        if rehearsal is None:
            return
        around_s, step_s, first_s, question_s = rehearsal
        of_trial = around_s + step_s * steps / plan.num_open + question_s
        source = (
            f"{cfg.measure_steps} steps of {concurrent} trials: {step_s:.3g} s a step, {around_s:.0f} s around a training, "
            f"{question_s:.1f} s an evaluation; sets decoded in {first_s:.0f} s"
        )
    else:
        return
    total_s = of_trial * math.ceil(plan.num_open / concurrent)
    gpus = plan.num_open * of_trial / 3600 * cfg.num_workers if cfg.use_gpu and isinstance(cfg.num_workers, int) else 0
    print(f"sweep: about {duration(total_s)}" + (f", {gpus:.1f} GPU hours" if gpus else "") + f" (by {source})", flush=True)


def _rehearse(
    cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, concurrent: int
) -> tuple[float, float, float, float] | None:
    """The next trials, for some steps, at once, by the code that will run them.

    :returns: seconds of a trial around its steps, of a step, of the first evaluation (sets are decoded), of each further one.
    """
    folder = output.join("_rehearsal")
    remove_folder(folder)
    jobs = []
    for job in plan.coming(concurrent):
        steps = min(cfg.measure_steps, job.cfg.num_steps)
        loop = replace(
            job.cfg.train, steps=steps, samples_seen=None, log_every=max(1, steps // 4), validate_every=None, keep_best=False
        )
        jobs.append(Job(job.name, replace(job.cfg, output=join(folder, job.name), train=loop, evaluators=[])))
    results: list[dict[str, Any]] = []
    left = iter(jobs)
    _tune(
        lambda: next(left, None),
        lambda name, result: results.append(result),
        pool=None,
        concurrent=len(jobs),
        place=join(folder, "_ray"),
        objective=cfg.objective,
        scheduler=None,
    )
    good = [result for result in results if result["status"] == "finished"]
    if not good:
        print(f"sweep: the rehearsal ended with: {results[0]['reason']}", flush=True)
        remove_folder(folder)
        return None
    step_s = statistics.fmean(jobs[0].cfg.global_batch / result["samples_per_s"] for result in good)
    around_s = statistics.fmean(result["seconds"] - step_s * result["steps"] for result in good)
    answers_s = []
    run = next(job.cfg.output for job, result in zip(jobs, results, strict=True) if exists(join(job.cfg.output, "open_clip")))
    for _ in range(2):
        began = time.monotonic()
        ray.get([asked.result for asked in pool.ask(Spec(run, None))])
        answers_s.append(time.monotonic() - began)
    remove_folder(folder)
    return around_s, step_s, answers_s[0], answers_s[1]


# ---- trials on Tune ---------------------------------------------------------------------------------------------------


def _run_trials(cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, concurrent: int) -> None:
    lock = RunLock.take(output.path)
    progress = Progress("sweep", plan.num_trials, "trials", already=plan.num_trials - plan.num_open)

    def begin() -> Job | None:
        job = plan.next()
        if job is not None:
            remove_file(plan.result_file(job.name))  # of a crash
        return job

    def end(name: str, result: dict[str, Any]) -> None:
        lock.check()  # a zombie's trials fail because another call has taken them over: that is no result
        write_json(plan.result_file(name), result)
        plan.ended(name, result)
        progress.advance(note=f"{name} {result['status']}")

    try:
        place = output.join("_ray")
        _tune(
            begin, end, pool=pool, concurrent=concurrent, place=place, objective=cfg.objective, scheduler=_asha(cfg, plan, output)
        )
        lock.check()
    except LostLock as error:
        raise UserError(str(error)) from error
    progress.close()
    remove_folder(output.join("lock"))


def _asha(cfg: SweepConfig, plan: Plan, output: Output) -> ASHAScheduler | None:
    """Early stopping, which knows of the trials that have ended."""
    if cfg.asha.grace_steps is None:
        return None
    scheduler = ASHAScheduler(
        time_attr="step",
        metric="score",
        mode="max",
        max_t=plan.most_steps() + 1,
        grace_period=cfg.asha.grace_steps,
        reduction_factor=cfg.asha.reduction_factor,
    )
    for name, result in plan.results.items():
        if result["status"] in ("finished", "stopped"):
            before: Any = SimpleNamespace(trial_id=name)
            scheduler.on_trial_add(None, before)  # type: ignore[arg-type]  # it does not look at the controller
            for line in read_metrics(output.join("trials", name)):
                if SCORE in line:
                    told = {"step": line["step"], "score": _score(cfg.objective, line)}
                    scheduler.on_trial_result(None, before, told)  # type: ignore[arg-type]
    return scheduler


def _score(objective: str, line: dict[str, float]) -> float:
    """What trials are compared by, of a validation."""
    return line[SCORE] if objective == "mean" else line[f"val/{objective}/{PRIMARY[objective]}"]


def _tune(
    begin: Callable[[], Job | None],
    end: Callable[[str, dict[str, Any]], None],
    *,
    pool: EvaluatorPool | None,
    concurrent: int,
    place: str,
    objective: str,
    scheduler: TrialScheduler | None,
) -> None:
    """Run the trials that ``begin`` gives until it gives None; ``end`` takes the result of each as it comes.

    :param place: folder for Tune's own state; ours is in results.
    """

    class Jobs(Searcher):
        def suggest(self, trial_id: str) -> Any:
            job = begin()
            return Searcher.FINISHED if job is None else {"job": job}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            pass  # Results does it

        def save(self, checkpoint_path: str) -> None:
            pass

    class Results(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            last = trial.last_result
            early = {"status": "stopped", "reason": "among the worst at that step (asha)"}
            end(trial.config["job"].name, last.get("result") or early | {"steps": last["step"], "metrics": last["metrics"]})

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            lines = [line for line in str(trial.get_error() or "its process died").splitlines() if line.strip()]
            end(trial.config["job"].name, {"status": "crashed", "reason": lines[-1].strip()})

    def trial(config: dict[str, Any]) -> None:
        tune.report({"result": _train(config["job"], pool, concurrent, objective if scheduler else None)})

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": TRIAL_CPUS}),
        tune_config=tune.TuneConfig(
            search_alg=Jobs(),
            scheduler=scheduler,
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=scheduler is None,  # else the training of a trial that is stopped would go on in its actor
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(name="tune", storage_path=place, verbose=0, callbacks=[Results()]),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Tune prints a line a trial, whatever its verbosity; ours follow
        tuner.fit()
    remove_folder(place)


def _train(job: Job, pool: EvaluatorPool | None, concurrent: int, objective: str | None) -> dict[str, Any]:
    """A trial, in its own process. :param objective: what Tune compares it by on its way; None: by nothing.

    :returns: what stands in result.json; a point that cannot be trained is a result too.
    """

    def heard(step: int, line: dict[str, float]) -> None:
        if objective is not None and step < job.cfg.num_steps:  # at the end nothing is won by stopping it
            tune.report({"step": step, "score": _score(objective, line), "metrics": _of_sets(line, "val/")})

    began = time.monotonic()
    try:
        run = train_run(job.cfg, concurrent_runs=concurrent, pool=pool, heard=heard)
    except (UserError, WorkFailed) as error:  # too little is kept at this point, or it diverged
        if isinstance(error.__cause__, LostLock):
            raise
        return {"status": "failed", "reason": str(getattr(error, "cause", error))}
    manifest = read_json(run.join("manifest.json"))
    metrics = _of_sets(manifest.get("validation", {}), "")
    if pool is not None and not metrics:  # the evaluator failed beside the training, which goes on without; here it must not
        metrics = {
            answer.evaluator: answer.metrics for answer in ray.get([asked.result for asked in pool.ask(Spec(run.path, None))])
        }
    counts = manifest["counts"]
    return {
        "status": "finished",
        "reason": None,
        "steps": counts["steps"],
        "kept_share": counts["samples_kept"] / counts["samples"],
        "metrics": metrics,
        "seconds": time.monotonic() - began,
        "samples_per_s": manifest["samples_per_s"],
        "ocr_engines": _ocr_engines_opened(),
    }


def _of_sets(numbers: dict[str, float], prefix: str) -> dict[str, dict[str, float]]:
    """``{prefix}SET/METRIC`` -> set -> metric."""
    of_sets: dict[str, dict[str, float]] = {}
    for name, value in numbers.items():
        if name.startswith(prefix) and name != SCORE and "/" in name.removeprefix(prefix):
            a_set, metric = name.removeprefix(prefix).split("/", 1)
            of_sets.setdefault(a_set, {})[metric] = value
    return of_sets


def _ocr_engines_opened() -> int:
    """By this process."""
    engine = sys.modules.get("raysys.regions.engine")
    return engine.num_opened if engine is not None else 0


# ---- what came out ----------------------------------------------------------------------------------------------------


def _write_results(cfg: SweepConfig, plan: Plan, output: Output, num_decoded: dict[str, int]) -> None:
    """The files and the table; the manifest only when no trial is left.

    :raises UserError: where no trial ended well. :raises WorkFailed: where some crashed.
    """
    rows = plan.rows()
    points = points_of(rows, plan.keys, plan.objectives)
    write_tables(output.path, rows, points, plan.objectives)
    write_hparams(output.path, rows, plan.keys, plan.objectives)
    best = best_point(points)
    if best is not None:
        words = {k: v for k, v in asdict(plan.best(best)).items() if k not in ("output", "ray") and v is not None}
        write_bytes(output.join("best.yaml"), yaml.safe_dump(words, sort_keys=False, allow_unicode=True).encode())
    print("\n".join(table(rows, points, plan.keys, plan.objectives, best.number if best else None)))
    print(f"result: {mask(output.path)}")
    of_status = {
        status: [row for row in rows if row["status"] == status] for status in ("finished", "failed", "stopped", "crashed")
    }
    if of_status["crashed"]:
        first = of_status["crashed"][0]
        raise WorkFailed(
            f"{len(of_status['crashed'])} of {len(rows)} trials crashed, {first['trial']} with: {first['reason']}; the same words try them again"
        )
    if best is None:
        first = next((row for row in rows if row["status"] == "failed"), rows[0])
        raise UserError(f"no point of {mask(output.path)} finished with all its seeds; {first['trial']}: {first['reason']}")
    counts = {"points": len(points), "trials": len(rows)} | {
        status: len(those) for status, those in of_status.items() if status != "crashed"
    }
    ocr_engines = sum(result.get("ocr_engines", 0) for result in plan.results.values())
    output.finish(
        counts, best=best.number, keys=plan.keys, objectives=plan.objectives, decoded=num_decoded, ocr_engines_opened=ocr_engines
    )
    print(f"next:   raysys train config={mask(output.path)}/best.yaml output=RUN   or   raysys report {mask(output.path)}")
