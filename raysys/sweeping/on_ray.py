"""``raysys sweep``: Ray Tune over points and seeds; each trial is :func:`raysys.training.on_ray.train_run`, as in ``raysys train``.

In: a space, the words of train and of evaluate. Out: W/{results.parquet, front.json, best.yaml, tensorboard, evidence, trials/TRIAL,
manifest.json}. Annotations were made once, before; each selection is made once, in the driver; evaluation sets are decoded once, by one pool
of evaluators that all trials ask. A trial whose ``result.json`` is there has ended; the same words take up every other one from its
checkpoints. Which trials there are stands in :mod:`raysys.sweeping.plan`, what comes out of them in :mod:`raysys.sweeping.results`.
"""

from __future__ import annotations

import contextlib
import io
import math
import shlex
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysys.cluster import (
    check_storage,
    make_room,
    num_cpus,
    on_this_node,
    only_here,
    ray_session,
    settled_nodes,
    watched,
)
from raysys.config import AshaConfig, SweepConfig, TrainConfig
from raysys.console import Progress, duration, say, tell_result
from raysys.corpus.shards import first_shards, open_corpus
from raysys.errors import UserError, WorkFailed
from raysys.evaluation.evaluator import SetConfig
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import EvaluatorPool, Spec, bundles_beside, cpus_beside, evaluator_sets, inputs_of, pool_beside
from raysys.masking import as_written, mask
from raysys.output import Output, open_output
from raysys.room import Need, num_that_fit
from raysys.storage import exists, join, read_json, remove_file, remove_folder, write_bytes
from raysys.sweeping.plan import Job, Plan
from raysys.sweeping.results import best_point, points_of, table, write_hparams, write_tables
from raysys.sweeping.space import check_space, group_contents, read_space
from raysys.training.lock import LostLock, RunLock
from raysys.training.loop import Diverged
from raysys.training.metrics import read_metrics
from raysys.training.on_ray import NOT_LEARNT, StoppedEarly, Surroundings, run_settings, train_run, worker_bundle
from raysys.training.samples import choose_samples, order_of
from raysys.training.validation import SCORE

DRIVER_DEATHS = 3
"""Of one trial's driver that a sweep survives: a machine that runs out of memory kills it, the trial is not to blame."""
FREE = ("num_samples", "seeds", "max_concurrent", "measure_steps", "dry_run")
"""Keys that a sweep may be taken up without: the first two add trials."""


def sweep(cfg: SweepConfig) -> None:
    space = read_space(cfg.space)
    base = TrainConfig(**{f.name: getattr(cfg, f.name) for f in fields(TrainConfig)})
    check_space(space, base, cfg.search)
    corpus = open_corpus(base.corpus)
    sets, fingerprints = evaluator_sets(cfg)
    base = replace(base, evaluators=list(sets), **sets)  # type: ignore[arg-type]  # each set is a field of its name
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
    try:
        if plan.num_to_come:
            with ray_session(cfg.ray):
                num_decoded = _run(
                    cfg, base, sets, plan, output, first_shards(corpus.roots, (shard.name for shard in corpus.shards))
                )
        else:
            say(f"sweep: nothing is left to do, all {plan.num_trials} trials have ended")
    finally:
        if not exists(output.join("trials")):  # a dry run, or a mistake: other words may come
            output.forget()
    if cfg.dry_run:
        say("next:   the same words without dry_run=true")
    else:
        _tell_results(plan, output, num_decoded)


def _run(
    cfg: SweepConfig, base: TrainConfig, sets: dict[str, SetConfig], plan: Plan, output: Output, shards: dict[str, str]
) -> dict[str, int]:
    """:param shards: one of each source. :returns: set -> pictures that were decoded; those that lay decoded on disk don't count."""
    plan.judge()  # hours, of a billion rows: no GPU is asked for before
    concurrent = _concurrent(cfg, base, plan.num_to_come)
    check_storage(output.path, shards | inputs_of(sets))
    lock = None if cfg.dry_run else RunLock.take(output.path)
    pool = pool_beside(sets, cfg.service, threads=max(1, int(cpus_beside(cfg.service))))
    before: dict[str, int] = {}
    with watched(_need(cfg, base, 1)[0]):
        _tell_cost(cfg, plan, output, pool, concurrent)
        if lock is not None:
            if output.finished:  # with fewer samples or seeds
                before = read_json(output.join("manifest.json"))["decoded"]
                remove_file(output.join("manifest.json"))
            _run_trials(cfg, plan, output, pool, lock, concurrent)
    num_decoded = pool.num_decoded()
    pool.close()
    return {name: number + before.get(name, 0) for name, number in num_decoded.items()}


# ---- what it will cost ------------------------------------------------------------------------------------------------


def _concurrent(cfg: SweepConfig, base: TrainConfig, num_trials: int) -> int:
    """Trials at a time. :raises UserError: where the cluster has no room for them; Ray would wait in silence."""
    need, trial, pool = _need(cfg, base, min(cfg.max_concurrent or 1, num_trials))
    make_room(need, cfg.ray.wait_minutes, enough=[*pool, *trial])  # the other trials begin as there is room
    fit = num_that_fit(trial, [node.free for node in settled_nodes()], beside=pool)
    return min(cfg.max_concurrent or max(fit, 1), num_trials)


def _need(cfg: SweepConfig, base: TrainConfig, trials: int) -> tuple[Need, list[dict[str, float]], list[dict[str, float]]]:
    """Of that many trials at a time beside the evaluators; of one trial; of the evaluators."""
    workers, pool = base.worker_range[1], bundles_beside(cfg.service)
    trial = [worker_bundle(base)] * workers
    which = f"max_concurrent={trials} trials" if trials > 1 else "a trial"
    return Need(f"{which} of {workers} workers beside {len(pool)} evaluators", [*pool, *trial * trials]), trial, pool


def _tell_cost(cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, concurrent: int) -> None:
    """Trials, steps, samples, and the time that they take by a rehearsal or by the trials that have ended."""
    coming = plan.coming()
    steps = sum(job.cfg.num_steps for job in coming) * plan.num_to_come // len(coming)
    samples = sum(job.cfg.num_steps * job.cfg.global_batch for job in coming) * plan.num_to_come // len(coming)
    ended = plan.num_trials - plan.num_to_come
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    there = f"{num_gpus} GPUs, of which {concurrent * cfg.worker_range[1]} train" if cfg.use_gpu else f"{num_cpus()} CPUs"
    say(
        f"sweep: {plan.num_to_come} trials"
        + (f" ({ended} of {plan.num_trials} have ended already)" if ended else "")
        + f", {concurrent} at a time on {there}: {steps:,} steps, {samples:,} samples"
        + (", less where asha ends trials early" if cfg.asha.grace_steps else "")
    )
    questions_s = 0.0
    before = [r["seconds"] for r in plan.results.values() if r["status"] == "finished" and r["seconds"] is not None]
    if before:
        of_trial, source = statistics.fmean(before), f"{len(before)} trials that have ended"
    elif cfg.measure_steps:
        jobs = [job for job in coming if job.evidence not in plan.refused and job.cfg.num_steps > 1][:concurrent]
        if not jobs:
            return
        around_s, step_s, first_s, question_s = _rehearse(cfg, jobs, output, pool)
        steps_of_trial = steps / plan.num_to_come
        questions = 1 + (int(steps_of_trial - 1) // cfg.train.validate_every if cfg.train.validate_every else 0)
        questions_s = plan.num_to_come * questions * question_s  # one pool answers all
        of_trial = around_s + step_s * steps_of_trial + question_s * questions
        source = (
            f"{cfg.measure_steps} steps of {len(jobs)} trials: {step_s:.3g} s a step, {around_s:.0f} s around a training, "
            f"{question_s:.1f} s an evaluation; sets decoded in {first_s:.0f} s"
        )
    else:
        return
    total_s = max(of_trial * math.ceil(plan.num_to_come / concurrent), questions_s)
    paid = f", {total_s / 3600 * num_gpus:,.1f} hours of all GPUs" if cfg.use_gpu else ""
    say(f"sweep: about {duration(total_s)}{paid} (by {source})")


def _rehearse(cfg: SweepConfig, coming: list[Job], output: Output, pool: EvaluatorPool) -> tuple[float, float, float, float]:
    """The next trials, for some steps, at once, by the code that will run them.

    :returns: seconds of a trial around its steps, of a step, of the first evaluation (sets are decoded), of each further one.
    :raises WorkFailed: where all of them break: what costs minutes here would cost all trials.
    """
    folder = output.join("_rehearsal")
    remove_folder(folder)
    jobs = []
    for job in coming:
        steps = min(cfg.measure_steps, job.cfg.num_steps)
        loop = replace(
            job.cfg.train, steps=steps, samples_seen=None, log_every=max(1, steps // 4), validate_every=None, keep_best=False
        )
        jobs.append(Job(job.name, replace(job.cfg, output=join(folder, job.name), train=loop, evaluators=[]), job.evidence))
    results: dict[str, dict[str, Any]] = {}
    left = iter(jobs)
    _tune(
        lambda: next(left, None),
        results.__setitem__,
        pool=None,
        concurrent=len(jobs),
        place=join(folder, "_ray"),
        objective=cfg.objective,
        asha=None,
    )
    good = [(job, results[job.name]) for job in jobs if results[job.name]["status"] == "finished"]
    if not good:
        remove_folder(folder)
        raise WorkFailed(
            f"the rehearsal of {jobs[0].name} ended with: {results[jobs[0].name]['reason']}; no trial was begun (measure_steps=0 begins without one)"
        )
    step_s = statistics.fmean(job.cfg.global_batch / result["samples_per_s"] for job, result in good)
    around_s = statistics.fmean(result["seconds"] - step_s * result["steps"] for _, result in good)
    answers_s = []
    for _ in range(2):
        began = time.monotonic()
        ray.get([asked.result for asked in pool.ask(Spec(good[0][0].cfg.output, None))])
        answers_s.append(time.monotonic() - began)
    remove_folder(folder)
    return around_s, step_s, answers_s[0], answers_s[1]


# ---- trials on Tune ---------------------------------------------------------------------------------------------------


def _run_trials(cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, lock: RunLock, concurrent: int) -> None:
    def begin() -> Job | None:
        job = plan.next()
        if job is not None:
            remove_file(plan.result_file(job.name))  # of a crash
            with contextlib.suppress(UserError):  # its trial will say the same
                plan.judge_for(job)  # of tpe; all others are judged
        return job

    def end(name: str, result: dict[str, Any]) -> None:
        lock.check()  # a zombie's trials fail because another call has taken them over: that is no result
        plan.end(name, result)
        if result["status"] in ("finished", "stopped"):
            remove_folder(output.join("trials", name, "checkpoints"))  # nobody goes on from them; the model is in open_clip
        progress.advance(note=f"{name} {result['status']}")

    asha = None
    if cfg.asha.grace_steps is not None:
        asha = _Asha.options(scheduling_strategy=on_this_node()).remote(  # type: ignore[attr-defined]
            cfg.asha, _histories(plan, output, cfg.objective)
        )
    try:
        with Progress("sweep", plan.num_trials, "trials", already=plan.num_trials - plan.num_to_come) as progress:
            _tune(begin, end, pool=pool, concurrent=concurrent, place=output.join("_ray"), objective=cfg.objective, asha=asha)
        lock.check()
    except LostLock as error:
        raise UserError(str(error)) from error
    remove_folder(output.join("lock"))


@ray.remote(num_cpus=0)
class _Asha:
    """Ray Tune's successive halving, asked by the trials themselves: a trial that Tune stops would keep its workers' CPUs and GPUs."""

    def __init__(self, cfg: AshaConfig, histories: dict[str, list[tuple[int, float]]]) -> None:
        """:param histories: of trials that have ended, by name: steps and scores of their validations."""
        self._scheduler = ASHAScheduler(
            time_attr="step",
            metric="score",
            mode="max",
            max_t=sys.maxsize,
            grace_period=cfg.grace_steps or 1,
            reduction_factor=cfg.reduction_factor,
        )
        self._trials: dict[str, Any] = {}
        for name, scores in histories.items():
            for step, score in scores:
                self.goes_on(name, step, score)

    def goes_on(self, name: str, step: int, score: float) -> bool:
        controller: Any = None  # the scheduler does not look at it
        if name not in self._trials:
            self._trials[name] = SimpleNamespace(trial_id=name)
            self._scheduler.on_trial_add(controller, self._trials[name])
        decision = self._scheduler.on_trial_result(controller, self._trials[name], {"step": step, "score": score})
        return decision != TrialScheduler.STOP


def _histories(plan: Plan, output: Output, objective: str) -> dict[str, list[tuple[int, float]]]:
    """What asha was told in earlier calls."""
    found = {}
    for name, result in plan.results.items():
        if result["status"] in ("finished", "stopped"):
            lines = [line for line in read_metrics(output.join("trials", name)) if SCORE in line]
            last = result["steps"] if result["status"] == "finished" else math.inf  # at the end of a trial it is not asked
            found[name] = [(line["step"], _score(objective, line)) for line in lines if line["step"] < last]
    return found


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
    asha: Any,
) -> None:
    """Run the trials that ``begin`` gives until it gives None; ``end`` takes the result of each as it comes.

    :param place: folder for Tune's own state; ours is in results.
    :param asha: a handle of :class:`_Asha`; None: every trial runs to its end.
    """

    remove_folder(place)  # of a call that was killed

    class Jobs(Searcher):
        def suggest(self, trial_id: str) -> Any:
            job = begin()
            return Searcher.FINISHED if job is None else {"job": job}

        def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
            pass  # Results does it

        def save(self, checkpoint_path: str) -> None:
            pass

    class Results(tune.Callback):
        broken: Exception | None = None

        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            try:
                end(trial.config["job"].name, trial.last_result["result"])
            except Exception as error:  # ours, not the trial's, as Tune would have it
                self.broken = error
                raise

        def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            if self.broken is not None:
                raise self.broken
            end(trial.config["job"].name, {"status": "crashed", "reason": f"its process died {DRIVER_DEATHS + 1} times"})

    def trial(config: dict[str, Any]) -> None:
        """What it raises itself is a result: of errors, Tune sees deaths of its process only, and begins it again."""
        try:
            result = _train(config["job"], pool, concurrent, objective, asha)
        except Exception as error:
            result = {
                "status": "crashed",
                "reason": str(traceback.format_exception_only(error)[-1]).strip().splitlines()[-1].strip(),
            }
        tune.report({"result": result})

    results = Results()
    tuner = tune.Tuner(
        tune.with_resources(trial, only_here()),  # beside the sweep's driver: any other node may die
        tune_config=tune.TuneConfig(
            search_alg=Jobs(),
            num_samples=-1,
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=place,
            verbose=0,
            callbacks=[results],
            failure_config=tune.FailureConfig(max_failures=DRIVER_DEATHS),
        ),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Tune prints a line a trial, whatever its verbosity; ours follow
        try:
            tuner.fit()
        except tune.TuneError as error:  # what Tune makes of any error of its callbacks
            raise results.broken or error from error
    remove_folder(place)


def _train(job: Job, pool: EvaluatorPool | None, concurrent: int, objective: str, asha: Any) -> dict[str, Any]:
    """A trial, in its own process. What is not the point's fault is raised, and makes a crash, which the same words try again.

    :returns: what stands in result.json; a point that cannot be trained is a result too.
    """

    def heard(step: int, line: dict[str, float]) -> bool:
        at_its_end = step >= job.cfg.num_steps  # nothing is won by stopping it there
        return asha is None or at_its_end or ray.get(asha.goes_on.remote(job.name, step, _score(objective, line)))

    began = time.monotonic()
    is_new = not exists(join(job.cfg.output, "settings.json"))
    opened = _ocr_engines_opened()
    index = choose_samples(job.cfg, job.evidence)
    kept = {"kept_share": len(index) / index.num_samples_before}
    try:
        order_of(job.cfg, index)
    except UserError as error:  # too little is kept at this point
        return {"status": "failed", "reason": str(error)} | kept
    try:
        run = train_run(job.cfg, Surroundings(concurrent, pool, job.evidence, heard))
    except StoppedEarly as stop:
        step, line = stop.args
        return {
            "status": "stopped",
            "reason": "among the worst at that step (asha)",
            "steps": step,
            "metrics": _of_sets(line, "val/"),
        } | kept
    except Diverged as error:
        return {"status": "failed", "reason": str(error)} | kept
    manifest = read_json(run.join("manifest.json"))
    metrics = _of_sets(manifest.get("validation", {}), "")
    if pool is not None and not metrics:  # the evaluator failed beside the training, which goes on without; here it must not
        metrics = {
            answer.evaluator: answer.metrics for answer in ray.get([asked.result for asked in pool.ask(Spec(run.path, None))])
        }
    return kept | {
        "status": "finished",
        "reason": None,
        "steps": manifest["counts"]["steps"],
        "metrics": metrics,
        "seconds": time.monotonic() - began if is_new else None,
        "samples_per_s": manifest["samples_per_s"],
        "ocr_engines": _ocr_engines_opened() - opened,
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


def _tell_results(plan: Plan, output: Output, num_decoded: dict[str, int]) -> None:
    """Write the files and print the table; the manifest only when no trial is left, and not twice.

    :raises UserError: where no trial ended well. :raises WorkFailed: where some crashed.
    """
    rows = plan.rows()
    points = points_of(rows, plan.keys, plan.objectives)
    write_tables(output.path, rows, points, plan.objectives)
    write_hparams(output.path, rows, plan.keys, plan.objectives)
    best = best_point(points)
    if best is not None:
        words = {k: v for k, v in asdict(plan.words_of(best)).items() if k not in ("output", "ray", "verbosity") and v is not None}
        write_bytes(output.join("best.yaml"), yaml.safe_dump(as_written(words), sort_keys=False, allow_unicode=True).encode())
    else:
        remove_file(output.join("best.yaml"))  # of fewer seeds
    say("\n".join(table(rows, points, plan.keys, plan.objectives, best.number if best else None)))
    if best is not None:
        say(
            f"sweep: best is point {best.number}, its models: {', '.join(mask(output.join('trials', name)) for name in best.trials)}"
        )
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
        raise UserError(
            f"no point of {mask(output.path)} finished with all its seeds; {first['trial']}: {first['reason']}; give other values in a new folder"
        )
    counts = {"points": len(points), "trials": len(rows)} | {
        status: len(those) for status, those in of_status.items() if status != "crashed"
    }
    ocr_engines = sum(result.get("ocr_engines", 0) for result in plan.results.values())
    if not exists(output.join("manifest.json")):
        output.finish(
            counts,
            best=best.number,
            keys=plan.keys,
            objectives=plan.objectives,
            decoded=num_decoded,
            ocr_engines_opened=ocr_engines,
        )
    budget = "train.steps" if "steps" in words["train"] and words["train"]["steps"] else "train.samples_seen"
    place = shlex.quote(mask(output.path))
    tell_result(
        mask(output.path),
        best=f"raysys train config={place}/best.yaml {budget}=N output=RUN",
        board=f"tensorboard --logdir {place}",
        next_words=f"raysys report {place}; to train the best point longer, or on more data, the words behind `best`",
    )
