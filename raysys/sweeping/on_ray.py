"""``raysys sweep``: Ray Tune over thresholds and augmentation factors; each trial is :func:`raysys.training.on_ray.train_run`.

Annotations are made once, before. Evaluation sets are decoded once, in one service that all trials ask. A trial whose ``result.json``
is there is finished; any other is taken up from its checkpoints when the same words are said again.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from dataclasses import asdict, fields, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import yaml
from ray import tune

from raysys.cluster import num_cpus, ray_session, require
from raysys.config import SweepConfig, TrainConfig
from raysys.corpus.shards import absolute_corpus, open_corpus
from raysys.evaluation.evaluator import SetConfig
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import Spec, cpus_beside, evaluator_sets, num_actors_beside, pool_beside
from raysys.models import portable
from raysys.progress import Progress
from raysys.storage import (
    Output,
    UserError,
    WorkFailed,
    absolute,
    exists,
    is_local,
    open_output,
    read_json,
    remove_file,
    settings_of,
    write_bytes,
    write_json,
)
from raysys.sweeping.space import Point, at_point, pareto_front, points_of, read_space
from raysys.training.model import check_training_model
from raysys.training.on_ray import CPUS_PER_WORKER, train_run
from raysys.training.samples import check_evidence

TRIAL_CPUS = 0.01
"""A trial's driver only waits; Tune refuses 0."""


def sweep(cfg: SweepConfig) -> None:
    space = read_space(cfg.space)
    points = points_of(space, num_samples=cfg.num_samples, seed=cfg.seed)
    if cfg.annotations is None and any(key.startswith("policy.") for key in space):
        raise UserError("space: policy.* is swept, so annotations=FOLDER is needed (raysys annotate makes it, once)")
    base = _train_config(cfg)
    of_points = [at_point(base, point, "") for point in points]
    check_evidence(base)
    open_corpus(base.corpus)
    for cfg_of_point in {repr((c.model, c.pretrained, c.loss, c.towers, c.train)): c for c in of_points}.values():
        check_training_model(cfg_of_point)
    sets, fingerprints = evaluator_sets(cfg)
    output = open_output(
        cfg.output, "sweep", settings_of(cfg, "max_concurrent", "service") | {"space": space, "sets": fingerprints}
    )
    todo = [p for p in points if _row(output, p)["status"] != "finished"]
    print(
        f"sweep: {len(points)} points of {cfg.num_steps} steps"
        + (f", {len(points) - len(todo)} done already" if len(todo) < len(points) else "")
    )
    if todo:
        with ray_session(cfg.ray):
            _run_trials(cfg, base, sets, todo, output)
    rows = [_row(output, point) for point in points]
    _write_results(cfg, base, points, rows, output)
    _print_table(rows, output)


def _train_config(cfg: SweepConfig) -> TrainConfig:
    """The words of train, with paths that hold in any process: Tune gives each trial a working folder of its own."""
    base = TrainConfig(**{f.name: getattr(cfg, f.name) for f in fields(TrainConfig)})
    base.corpus = absolute_corpus(cfg.corpus)
    base.annotations = absolute(cfg.annotations) if cfg.annotations else None
    base.selection = absolute(cfg.selection) if cfg.selection else None
    model, pretrained = portable(cfg.model, cfg.pretrained)
    return replace(base, model=model, pretrained=pretrained, evaluators=[])  # one service asks all trials, at their end


def _run_trials(cfg: SweepConfig, base: TrainConfig, sets: dict[str, SetConfig], todo: list[Point], output: Output) -> None:
    concurrent = min(cfg.max_concurrent, len(todo))
    workers = base.worker_range[1] * concurrent
    require(
        f"sweep with {concurrent} trials of {base.worker_range[1]} workers at a time",
        cpus=workers * CPUS_PER_WORKER + concurrent * TRIAL_CPUS + num_actors_beside(cfg.service) * cpus_beside(cfg.service),
        gpus=num_actors_beside(cfg.service) * cfg.service.num_gpus_per_actor + (workers if base.use_gpu else 0),
    )
    pool = pool_beside(sets, cfg.service, threads=num_cpus())

    def trial(config: dict[str, int]) -> None:
        point = todo[config["point"]]
        result: dict[str, Any] = {"status": "finished", "reason": None}
        run = output.join("trials", point.name)
        remove_file(_result_file(output, point))  # of a failure that is tried again
        try:
            manifest_of = train_run(at_point(base, point, run), concurrent_runs=concurrent)
            counts = read_json(manifest_of.join("manifest.json"))["counts"]
            result["kept_share"] = counts["samples_kept"] / counts["samples"]
            answers = ray.get([asked.result for asked in pool.ask(Spec(run, None))])
            result["metrics"] = {answer.evaluator: answer.metrics for answer in answers}
        except (UserError, WorkFailed) as error:  # too little kept at this point, or it diverged: a row, not the end of the sweep
            result = {"status": "failed", "reason": str(getattr(error, "cause", error))}
        write_json(_result_file(output, point), result)

    progress = Progress("sweep", len(todo), "trials")

    class Follow(tune.Callback):
        def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
            progress.advance()

        on_trial_error = on_trial_complete

    tuner = tune.Tuner(
        tune.with_resources(trial, {"CPU": TRIAL_CPUS}),
        param_space={"point": tune.grid_search(list(range(len(todo))))},
        tune_config=tune.TuneConfig(max_concurrent_trials=concurrent),
        run_config=tune.RunConfig(name="ray", storage_path=output.join("_ray"), verbose=0, callbacks=[Follow()]),
    )
    with contextlib.redirect_stdout(io.StringIO()):  # Tune prints a line a trial, whatever its verbosity; ours follow
        grid = tuner.fit()
    progress.close()
    pool.close()
    for result in (grid[i] for i in range(len(grid))):
        if result.error is not None:
            point = todo[(result.config or {})["point"]]
            reason = str(result.error).strip().splitlines()[-1]
            print(f"sweep: {point.name} stopped: {reason}; the same words try it again")
    if is_local(output.path):
        shutil.rmtree(output.join("_ray"), ignore_errors=True)  # Tune's own state; ours is in trials


def _result_file(output: Output, point: Point) -> str:
    return output.join("trials", point.name, "result.json")


def _row(output: Output, point: Point) -> dict[str, Any]:
    """A line of the results table."""
    file = _result_file(output, point)
    result: dict[str, Any] = (
        read_json(file) if exists(file) else {"status": "stopped", "reason": "no result; run the same words again"}
    )
    objectives = {f"{name}/{PRIMARY[name]}": metrics[PRIMARY[name]] for name, metrics in result.get("metrics", {}).items()}
    return {
        "trial": point.name,
        "status": result["status"],
        "reason": result.get("reason"),
        **point.values,
        "kept_share": result.get("kept_share"),
        **objectives,
        "score": sum(objectives.values()) / len(objectives) if objectives else None,
    }


def _write_results(cfg: SweepConfig, base: TrainConfig, points: list[Point], rows: list[dict[str, Any]], output: Output) -> None:
    """results.parquet, front.json, best.yaml; the manifest only when no trial is left. :raises UserError: where no trial ended well."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.BytesIO()
    pq.write_table(pa.table({c: [row.get(c) for row in rows] for c in columns}), buffer)
    write_bytes(output.join("results.parquet"), buffer.getvalue())
    finished = [row for row in rows if row["status"] == "finished"]
    if not finished:
        raise UserError(f"no trial of {output.path} finished; the first one: {rows[0]['reason']}")
    objectives = [f"{name}/{PRIMARY[name]}" for name in cfg.evaluators]
    write_json(output.join("front.json"), pareto_front({row["trial"]: tuple(row[o] for o in objectives) for row in finished}))
    best = max(finished, key=lambda row: row["score"])
    winner = asdict(at_point(base, next(p for p in points if p.name == best["trial"]), ""))
    words = {key: value for key, value in winner.items() if key not in ("output", "ray") and value is not None}
    write_bytes(output.join("best.yaml"), yaml.safe_dump(words, sort_keys=False, allow_unicode=True).encode())
    stopped = [row["trial"] for row in rows if row["status"] == "stopped"]
    if stopped:
        raise UserError(f"{len(stopped)} of {len(rows)} trials stopped ({stopped[0]} first); run the same words again")
    output.finish({"trials": len(rows), "finished": len(finished), "failed": len(rows) - len(finished)}, best=best["trial"])


def _print_table(rows: list[dict[str, Any]], output: Output) -> None:
    front = set(read_json(output.join("front.json")))
    columns = [c for c in dict.fromkeys(key for row in rows for key in row) if c not in ("status", "reason")]
    lines = [columns] + [[_cell(row.get(c)) for c in columns] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    for number, line in enumerate(lines):
        mark = "  " if number == 0 else ("* " if rows[number - 1]["trial"] in front else "  ")
        note = "" if number == 0 or rows[number - 1]["reason"] is None else f"  {rows[number - 1]['reason']}"
        print(mark + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + note)
    best = read_json(output.join("manifest.json"))["best"]
    print(f"sweep: * is on the Pareto front; best mean of the objectives: {best}")
    print(f"result: {output.path}")
    print(f"next:   raysys train config={output.path}/best.yaml output=RUN   or   raysys report {output.path}")


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if isinstance(value, float) else str(value)
