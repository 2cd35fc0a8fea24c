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
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from types import SimpleNamespace
from typing import Any

import ray
import yaml
from ray import tune
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from raysys.cluster import NoRoom, num_cpus, ray_session, require
from raysys.config import SweepConfig, TrainConfig
from raysys.corpus.shards import open_corpus
from raysys.evaluation.evaluator import SetConfig
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import EvaluatorPool, Spec, cpus_beside, evaluator_sets, num_actors_beside, pool_beside
from raysys.progress import Progress, duration
from raysys.storage import (
    Output,
    UserError,
    WorkFailed,
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
from raysys.sweeping.plan import Job, Plan
from raysys.sweeping.results import best_point, points_of, table, write_hparams, write_tables
from raysys.sweeping.space import check_space, group_contents, read_space
from raysys.training.lock import LostLock, RunLock
from raysys.training.metrics import read_metrics
from raysys.training.on_ray import CPUS_PER_WORKER, NOT_LEARNT, Surroundings, run_settings, train_run
from raysys.training.validation import SCORE

TRIAL_CPUS = 0.01
"""A trial's driver only waits; Tune refuses 0."""
FREE = ("num_samples", "seeds", "max_concurrent", "measure_steps", "dry_run")
"""Keys that a sweep may be taken up without: the first two add trials."""


def sweep(cfg: SweepConfig) -> None:
    space = read_space(cfg.space)
    base = TrainConfig(**{f.name: getattr(cfg, f.name) for f in fields(TrainConfig)})
    check_space(space, base, cfg.search)
    open_corpus(base.corpus)
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
            plan.judge()
            with ray_session(cfg.ray):
                num_decoded = _run(cfg, base, sets, plan, output)
        else:
            print(f"sweep: nothing is left to do, all {plan.num_trials} trials have ended")
    finally:
        if list_names(output.path) == ["settings.json"]:  # a mistake in the words: others may come
            output.forget()
    if cfg.dry_run:
        print("next:   the same words without dry_run=true")
    else:
        _write_results(plan, output, num_decoded)


def _run(cfg: SweepConfig, base: TrainConfig, sets: dict[str, SetConfig], plan: Plan, output: Output) -> dict[str, int]:
    """:returns: set -> pictures that were decoded; those that lay decoded on disk don't count."""
    concurrent = _concurrent(cfg, base, plan.num_to_come)
    pool = pool_beside(sets, cfg.service, threads=max(1, int(cpus_beside(cfg.service))))
    _tell_cost(cfg, plan, output, pool, concurrent)
    if not cfg.dry_run:
        remove_file(output.join("manifest.json"))  # of fewer samples or seeds
        _run_trials(cfg, plan, output, pool, concurrent)
    num_decoded = pool.num_decoded()
    pool.close()
    return num_decoded


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
    coming = plan.coming()
    steps = sum(job.cfg.num_steps for job in coming) * plan.num_to_come // len(coming)
    samples = sum(job.cfg.num_steps * job.cfg.global_batch for job in coming) * plan.num_to_come // len(coming)
    ended = plan.num_trials - plan.num_to_come
    num_gpus = int(ray.cluster_resources().get("GPU", 0))
    there = f"{num_gpus} GPUs, of which {concurrent * cfg.worker_range[1]} train" if cfg.use_gpu else f"{num_cpus()} CPUs"
    print(
        f"sweep: {plan.num_to_come} trials"
        + (f" ({ended} of {plan.num_trials} have ended already)" if ended else "")
        + f", {concurrent} at a time on {there}: {steps:,} steps, {samples:,} samples"
        + (", less where asha ends trials early" if cfg.asha.grace_steps else ""),
        flush=True,
    )
    before = [r["seconds"] for r in plan.results.values() if r["status"] == "finished"]
    if before:  # one that was killed and taken up again counts its last part only
        of_trial, source = max(before), f"the longest of {len(before)} trials that have ended"
    elif cfg.measure_steps:
        jobs = [job for job in coming if job.evidence not in plan.refused][:concurrent]
        if not jobs:
            return
        around_s, step_s, first_s, question_s = _rehearse(cfg, jobs, output, pool)
        steps_of_trial = steps / plan.num_to_come
        questions = 1 + (int(steps_of_trial - 1) // cfg.train.validate_every if cfg.train.validate_every else 0)
        of_trial = around_s + step_s * steps_of_trial + question_s * questions
        source = (
            f"{cfg.measure_steps} steps of {len(jobs)} trials: {step_s:.3g} s a step, {around_s:.0f} s around a training, "
            f"{question_s:.1f} s an evaluation; sets decoded in {first_s:.0f} s"
        )
    else:
        return
    total_s = of_trial * math.ceil(plan.num_to_come / concurrent)
    paid = f", {total_s / 3600 * num_gpus:,.1f} hours of all GPUs" if cfg.use_gpu else ""
    print(f"sweep: about {duration(total_s)}{paid} (by {source})", flush=True)


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
        scheduler=None,
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


def _run_trials(cfg: SweepConfig, plan: Plan, output: Output, pool: EvaluatorPool, concurrent: int) -> None:
    lock = RunLock.take(output.path)
    progress = Progress("sweep", plan.num_trials, "trials", already=plan.num_trials - plan.num_to_come)

    def begin() -> Job | None:
        job = plan.next()
        if job is not None:
            remove_file(plan.result_file(job.name))  # of a crash
            with contextlib.suppress(UserError):  # its trial will say the same
                plan.judge_for(job)  # of tpe; all others are judged
        return job

    def end(name: str, result: dict[str, Any]) -> None:
        lock.check()  # a zombie's trials fail because another call has taken them over: that is no result
        write_json(plan.result_file(name), result)
        if result["status"] in ("finished", "stopped"):
            remove_folder(output.join("trials", name, "checkpoints"))  # nobody goes on from them; the model is in open_clip
        plan.ended(name, result)
        progress.advance(note=f"{name} {result['status']}")

    try:
        place = output.join("_ray")
        _tune(
            begin, end, pool=pool, concurrent=concurrent, place=place, objective=cfg.objective, scheduler=_asha(cfg, plan, output)
        )
    except tune.TuneError:  # what Tune makes of any error of its callbacks
        try:
            lock.check()
        except LostLock as error:
            raise UserError(str(error)) from error
        raise
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
        max_t=plan.most_steps + 1,
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
        run = train_run(job.cfg, Surroundings(concurrent, pool, job.evidence, heard))
    except NoRoom:  # a node is gone: not the point's fault
        raise
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


def _write_results(plan: Plan, output: Output, num_decoded: dict[str, int]) -> None:
    """The files and the table; the manifest only when no trial is left.

    :raises UserError: where no trial ended well. :raises WorkFailed: where some crashed.
    """
    rows = plan.rows()
    points = points_of(rows, plan.keys, plan.objectives)
    write_tables(output.path, rows, points, plan.objectives)
    write_hparams(output.path, rows, plan.keys, plan.objectives)
    best = best_point(points)
    if best is not None:
        words = {k: v for k, v in asdict(plan.words_of(best)).items() if k not in ("output", "ray") and v is not None}
        write_bytes(output.join("best.yaml"), yaml.safe_dump(words, sort_keys=False, allow_unicode=True).encode())
    print("\n".join(table(rows, points, plan.keys, plan.objectives, best.number if best else None)))
    print(f"result: {mask(output.path)}")
    if best is not None:
        print(f"best:   point {best.number}, its models: {', '.join(mask(output.join('trials', name)) for name in best.trials)}")
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
    budget = "train.steps" if "steps" in words["train"] and words["train"]["steps"] else "train.samples_seen"
    print(
        f"next:   raysys report {mask(output.path)}   or, longer or on more data: "
        f"raysys train config={mask(output.path)}/best.yaml {budget}=N output=RUN"
    )
