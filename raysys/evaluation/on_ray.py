"""``raysys attack`` and ``raysys evaluate`` on Ray: a task for each class folder, one evaluator actor that keeps its decoded sets.

In: :class:`AttackConfig`, :class:`EvaluateConfig`. Out: O/{CLASS/NAME.JPEG, attack.parquet, manifest.json} and
E/{results/<set>_<model>.json, predictions/<set>.parquet, manifest.json}. What is drawn and what is asked stands in
:mod:`raysys.evaluation.attack` and :mod:`raysys.evaluation.evaluator`.
"""

from __future__ import annotations

import io
import itertools
import json
import os
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch

from raysys.cluster import ray_session, require
from raysys.config import AttackConfig, AttackSettings, EvaluateConfig, QuestionsConfig
from raysys.evaluation.attack import RANDOM, attack_table, choose_written, draw_attack, font_file, to_jpeg
from raysys.evaluation.datasets import ATTACK_FILE, CLASSES_FILE, Picture, open_picture, read_class_set
from raysys.evaluation.evaluator import ATTACKED, Evaluator, SetConfig, SetResult, Step, acc1_drop, read_set
from raysys.models import LoadedModel, check_model, model_name, portable
from raysys.progress import Progress
from raysys.storage import (
    Output,
    UserError,
    absolute,
    exists,
    fingerprint,
    mask,
    open_output,
    read_bytes,
    read_json,
    settings_of,
    sha256_file,
    write_bytes,
)


def attack(cfg: AttackConfig) -> str:
    """Write ImageNet-Attr; what is already drawn stays. :returns: the output folder."""
    clean = read_class_set(cfg.imagenet)
    written = choose_written(cfg.attack, clean)
    table = attack_table(clean, written, cfg.attack)
    font = font_file(cfg.attack)
    facts = {"source": clean.fingerprint, "written": fingerprint(written), "font_sha256": sha256_file(font)}
    output = open_output(cfg.output, "attack", settings_of(cfg) | facts)
    if output.finished:
        print(f"nothing left to do: {len(written)} attacked pictures are there")
    else:
        rows = list(zip(clean.pictures, table["picture"].to_pylist(), table["text"].to_pylist(), clean.labels, strict=True))
        by_class = itertools.groupby(rows, lambda row: row[3])  # the set is sorted by class
        folders = [[(source, output.join(name), text) for source, name, text, _ in group] for _, group in by_class]
        with ray_session(cfg.ray):
            progress = Progress("attack", len(rows), "pictures")
            settings = replace(cfg.attack, font=absolute(font))
            waiting = [_attack_folder.remote(folder, settings) for folder in folders]
            while waiting:
                done, waiting = ray.wait(waiting)
                for count in ray.get(done):
                    progress.advance(count)
            progress.close()
        if cfg.imagenet.classes is not None:
            write_bytes(output.join(CLASSES_FILE), read_bytes(cfg.imagenet.classes))
        _write_parquet(output.join(ATTACK_FILE), table)
        same = sum(clean.class_names[w] == clean.class_names[t] for w, t in zip(written, clean.labels, strict=True))
        output.finish(
            {"pictures": len(written), "classes_with_pictures": clean.num_classes_with_pictures, "self_attacks": same},
            font=os.path.basename(font),
            font_sha256=facts["font_sha256"],
            font_px=cfg.attack.font_px,
            classes=mask(cfg.attack.classes),
            seed=cfg.attack.seed if cfg.attack.classes == RANDOM else None,
        )
        what = f"{len(written)} attacked pictures of {clean.num_classes_with_pictures} classes"
        print(f"{what}, {same} of them with their own class's name; font {os.path.basename(font)}")
    print(f"result: {mask(output.path)}")
    classes = f" imagenet_attr.classes={cfg.imagenet.classes}" if cfg.imagenet.classes else ""
    print(f"next: raysys evaluate model=M 'evaluators=[{ATTACKED}]' {ATTACKED}.path={mask(output.path)}{classes} output=E")
    return output.path


@ray.remote
def _attack_folder(pictures: list[tuple[Picture, str, str]], settings: AttackSettings) -> int:
    """Draw the pictures (source, target path, text) that are not there yet. :returns: how many pictures the folder has."""
    for source, target, text in pictures:
        if not exists(target):
            write_bytes(target, to_jpeg(draw_attack(open_picture(source), text, settings)))
    return len(pictures)


SERVICE_CPUS = 0.1
"""Of a service beside workers: below what they leave of a core (they ask for .9 each), so that it fits on the machine that they fill."""


@ray.remote
class EvaluatorService:
    """An :class:`Evaluator` behind an actor; ``.options(num_cpus=..., num_gpus=...)`` says what it may use."""

    def __init__(self, sets: dict[str, SetConfig], batch_size: int, *, threads: int | None = None) -> None:
        """:param threads: None: as many as the actor's CPUs. A sweep's service asks for a fraction and works while workers rest."""
        mine = ray.get_runtime_context().get_assigned_resources()
        threads = threads or max(int(mine.get("CPU", 1)), 1)
        torch.set_num_threads(threads)
        device = "cuda" if mine.get("GPU", 0) > 0 and torch.cuda.is_available() else "cpu"
        self._evaluator = Evaluator(sets, batch_size=batch_size, device=device, threads=threads)

    def evaluate(self, model: str, pretrained: str | None = None) -> dict[str, dict[str, float]]:
        """Metrics of every set."""
        return self._evaluator.evaluate(model, pretrained)

    def evaluate_weights(self, blueprint: LoadedModel, weights: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
        """Metrics of every set, of a model that is being trained: its architecture, and the weights as they are now."""
        blueprint = deepcopy(blueprint)  # what comes from Ray's object store is read-only
        blueprint.model.load_state_dict(weights)
        return self._evaluator.evaluate_loaded(blueprint)

    def steps(self, model: str, pretrained: str | None, names: Sequence[str]) -> Iterator[Step | SetResult]:
        """Progress and results as they come; call with ``num_returns="streaming"``."""
        yield from self._evaluator.steps(model, pretrained, names)


def evaluator_sets(cfg: QuestionsConfig) -> dict[str, SetConfig]:
    """The sets that a config asks for, with paths that hold on any process of this machine.

    Each is read once here: a missing one is refused before anything runs.
    """
    sets: dict[str, SetConfig] = {}
    for name in dict.fromkeys(cfg.evaluators):
        a_set: SetConfig = getattr(cfg, name)
        files = [key for key in ("path", "classes", "templates") if getattr(a_set, key, None) and exists(getattr(a_set, key))]
        paths: dict[str, Any] = {key: absolute(getattr(a_set, key)) for key in files}
        sets[name] = replace(a_set, **paths)
        read_set(name, sets[name])
    return sets


def evaluate(cfg: EvaluateConfig) -> str:
    """Ask one model every question; sets that an earlier call finished are not asked again. :returns: the output folder."""
    check_model(cfg.model, cfg.pretrained)
    name_of_model = model_name(cfg.model)
    sets = evaluator_sets(cfg)
    output = open_output(cfg.output, "evaluate", settings_of(cfg, "batch_size", "num_gpus"))
    files = {name: output.join("results", f"{name}_{name_of_model}.json") for name in sets}
    todo = {name: a_set for name, a_set in sets.items() if not exists(files[name])}
    if output.finished:
        print("nothing left to do: this evaluation is finished")
    elif todo:
        with ray_session(cfg.ray):
            for result in _ask(cfg, todo):
                # predictions first: where the JSON is, the set is done
                _write_parquet(output.join("predictions", f"{result.evaluator}.parquet"), result.predictions)
                content = json.dumps(_benchmark_shape(cfg, result), indent=2, ensure_ascii=False)
                write_bytes(files[result.evaluator], content.encode(), tmp_folder=output.path)
    results = {name: read_json(file) for name, file in files.items()}
    drop = _drop(output) if {"imagenet", ATTACKED} <= set(sets) else None
    if not output.finished:
        output.finish({name: result["metrics"]["num_pictures"] for name, result in results.items()}, acc1_drop=drop)
    print(_table(results, drop))
    print(f"result: {mask(output.path)}")
    print(f"next: raysys report {mask(output.path)}")
    return output.path


def _ask(cfg: EvaluateConfig, sets: dict[str, SetConfig]) -> Iterator[SetResult]:
    """One actor that takes the largest node's CPUs answers set by set."""
    require("the evaluator", cpus=1, gpus=cfg.num_gpus)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0) >= cfg.num_gpus]
    num_cpus = max((int(resources.get("CPU", 0)) for resources in nodes), default=0)
    if num_cpus == 0:
        raise UserError(f"num_gpus={cfg.num_gpus:g}: no single node has as many GPUs and a CPU; ask for less")
    options = {"num_cpus": num_cpus, "num_gpus": cfg.num_gpus}
    service = EvaluatorService.options(**options).remote(sets, cfg.batch_size)  # type: ignore[attr-defined]
    progress: Progress | None = None
    last = ("", "")
    for ref in service.steps.options(num_returns="streaming").remote(*portable(cfg.model, cfg.pretrained), list(sets)):
        item: Step | SetResult = ray.get(ref)
        if isinstance(item, SetResult):
            yield item
            continue
        if progress is None or (item.stage, item.unit) != last:
            if progress:
                progress.close()
            last, progress = (item.stage, item.unit), Progress(item.stage, item.total, item.unit)
        progress.advance(item.done)
    if progress:
        progress.close()


def _benchmark_shape(cfg: EvaluateConfig, result: SetResult) -> dict[str, Any]:
    """CLIP_benchmark's result file."""
    return {
        "dataset": result.dataset,
        "model": mask(cfg.model),
        "pretrained": mask(cfg.pretrained or ""),
        "task": result.task,
        "metrics": result.metrics,
        "language": "en",
    }


def _drop(output: Output) -> float | None:
    return acc1_drop(*(_read_parquet(output.join("predictions", f"{name}.parquet")) for name in ("imagenet", ATTACKED)))


def _table(results: dict[str, dict[str, Any]], drop: float | None) -> str:
    """Aligned text: one line a metric."""
    rows = [("set", "metric", "value")]
    for name, result in results.items():
        label = name if result["dataset"] == name else f"{name} ({result['dataset']})"
        for metric, value in result["metrics"].items():
            rows.append((label, metric, str(value) if isinstance(value, int) else f"{value:.4f}"))
    if drop is not None:
        rows.append((ATTACKED, "acc1_drop (clean - attacked)", f"{drop:.4f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}" for a, b, c in rows)


def _write_parquet(path: str, table: pa.Table) -> None:
    file = io.BytesIO()
    pq.write_table(table, file)
    write_bytes(path, file.getvalue())


def _read_parquet(path: str) -> pa.Table:
    return pq.read_table(io.BytesIO(read_bytes(path)))
