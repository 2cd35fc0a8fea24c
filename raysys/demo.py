"""``raysys demo``: the whole pipeline on the embedded corpus, by the same functions that the verbs call.

Draw scenes, find their text with the real OCR models, filter, train one model on everything and one on what was kept (same steps,
seed and recipe), write wrong words on held-out scenes, ask both models three questions, and report.

    D/scenes  D/annotations  D/selection  D/raw  D/filtered  D/attacked  D/evaluation  D/results.json  D/report.html
"""

from __future__ import annotations

import io
import json
import os
import shlex
import time
from dataclasses import replace
from typing import Any

import pyarrow.parquet as pq
import ray

from raysys.attack.on_ray import attack
from raysys.cluster import ray_session
from raysys.config import (
    OF_CPU,
    AnnotateConfig,
    AttackConfig,
    AttackSettings,
    ClassSetConfig,
    CorpusConfig,
    DemoConfig,
    EvaluateConfig,
    FilterConfig,
    ModelConfig,
    PolicyConfig,
    RetrievalSetConfig,
    TrainConfig,
)
from raysys.console import Progress, say, tell_result, within_another
from raysys.corpus import scenes
from raysys.corpus.shards import iter_samples, open_corpus
from raysys.evaluation.metrics import PRIMARY
from raysys.evaluation.on_ray import evaluate
from raysys.masking import mask
from raysys.output import Output, open_output, settings_of
from raysys.policy.policy import TEXT_AREA
from raysys.policy.select import filter_annotations
from raysys.regions.on_ray import annotate
from raysys.reporting.html import report
from raysys.storage import read_bytes, read_json, write_json
from raysys.training.cpu import fast_precision
from raysys.training.on_ray import train

NO_FILTER = PolicyConfig(name="none", max_text_area=1.0)
QUESTIONS = {"clean": "imagenet", "retrieval": "retrieval", "attacked": "imagenet_attr"}
"""Column of the table -> evaluator."""


def demo(cfg: DemoConfig) -> None:
    output = open_output(cfg.output, "demo", settings_of(cfg))
    started = time.time()
    if cfg.train.precision == OF_CPU:
        cfg = replace(cfg, train=replace(cfg.train, precision=fast_precision()))
        say(f"demo: trains in {cfg.train.precision}, which is fast on this CPU (train.precision=)")
    with ray_session(cfg.ray), within_another():
        _stage(1, "draw scenes")
        _draw(cfg, output)
        corpus = CorpusConfig(path=output.join("scenes", "train"))
        _stage(2, "find the text in every picture (raysys annotate)")
        annotate(AnnotateConfig(output=output.join("annotations"), corpus=corpus, ocr=cfg.ocr, ray=cfg.ray))
        _stage(3, "keep what has none (raysys filter)")
        filter_annotations(
            FilterConfig(output=output.join("selection"), annotations=output.join("annotations"), policy=PolicyConfig())
        )
        _stage(4, "train on everything, then on what was kept (raysys train, same steps and seed)")
        recipe = TrainConfig(
            corpus=corpus,
            model=cfg.model,
            global_batch=cfg.global_batch,
            num_workers=cfg.num_workers,
            seed=cfg.seed,
            train=cfg.train,
            order=cfg.order,
            optim=cfg.optim,
            augment=cfg.augment,
            ray=cfg.ray,
        )
        train(replace(recipe, output=output.join("raw"), annotations=output.join("annotations"), policy=NO_FILTER))
        train(replace(recipe, output=output.join("filtered"), selection=output.join("selection")))
        _stage(5, "write a wrong word on held-out scenes (raysys attack), ask both models three questions (raysys evaluate)")
        classes = ClassSetConfig(
            path=output.join("scenes", "val"), classes=output.join("scenes", "classes.json"), templates=_templates(output)
        )
        writing = AttackSettings(
            classes="random", seed=cfg.seed, font_px=20, x_px=8, y_px=46
        )  # the authors' recipe, scaled to 112 px
        attack(AttackConfig(output=output.join("attacked"), imagenet=classes, attack=writing, ray=cfg.ray))
        evaluate(_questions(cfg, output, classes))
    results = {name: _answers(output, name) for name in ("raw", "filtered")} | {"text_detector": measure_text_detector(output)}
    write_json(output.join("results.json"), results)
    output.finish({"scenes": cfg.num_scenes, "steps": cfg.train.steps}, minutes=round((time.time() - started) / 60, 1))
    page = report(output.path)
    say(_table(results))
    say(f"demo: {(time.time() - started) / 60:.1f} minutes")
    tell_result(
        f"{mask(output.path)}/results.json",
        report=mask(page),
        board=f"tensorboard --logdir {shlex.quote(mask(output.path))}",
        next_words=f"open {shlex.quote(mask(page))} in a browser; then raysys annotate corpus.path=YOUR_SHARDS output=ANNOTATIONS",
    )


def _stage(number: int, what: str) -> None:
    say(f"\n=== {number}/5 {what}")


@ray.remote
def _draw_shard(path: str, first: int, count: int, seed: int, text_share: float) -> int:
    scenes.write_shard(path, first, count, seed=seed, text_share=text_share)
    return count


def _draw(cfg: DemoConfig, output: Output) -> None:
    """Training shards in parallel, then the evaluation sets; what is there already stays."""
    plan = scenes.shard_plan(output.join("scenes", "train"), num_samples=cfg.num_scenes, samples_per_shard=500)
    todo = [shard for shard in plan if not shard[0].exists()]
    waiting = [_draw_shard.remote(str(path), first, count, cfg.seed, cfg.text_share) for path, first, count in todo]
    with Progress("draw", len(waiting), "shards") as progress:
        while waiting:
            done, waiting = ray.wait(waiting)
            progress.advance(len(done), items=sum(ray.get(done)))
    if not os.path.exists(output.join("scenes", "retrieval-00000.tar")):
        scenes.write_evaluation_sets(output.join("scenes"), seed=cfg.seed)
    say(f"demo: {cfg.num_scenes} scenes to train on, {cfg.text_share:.0%} of them with text")


def _templates(output: Output) -> str:
    """The shortest captions of the corpus."""
    file = output.join("scenes", "templates.txt")
    with open(file, "w", encoding="utf-8") as opened:
        opened.write("a photo of a {}\na {}\n")
    return file


def _questions(cfg: DemoConfig, output: Output, classes: ClassSetConfig) -> EvaluateConfig:
    return EvaluateConfig(
        output=output.join("evaluation"),
        models={name: ModelConfig(output.join(name)) for name in ("raw", "filtered")},
        evaluators=list(QUESTIONS.values()),
        imagenet=classes,
        imagenet_attr=replace(classes, path=output.join("attacked")),
        retrieval=RetrievalSetConfig(path=output.join("scenes", "retrieval-00000.tar")),
        ray=cfg.ray,
    )


def _answers(output: Output, name: str) -> dict[str, float]:
    files = {column: output.join("evaluation", "results", f"{evaluator}_{name}.json") for column, evaluator in QUESTIONS.items()}
    return {column: read_json(file)["metrics"][PRIMARY[QUESTIONS[column]]] for column, file in files.items()}


def measure_text_detector(output: Output) -> dict[str, float]:
    """The filter against the truth that the generator knows: shares of pictures with (without) text that were dropped for text."""
    dropped = {True: 0, False: 0}
    total = {True: 0, False: 0}
    corpus = open_corpus(CorpusConfig(output.join("scenes", "train")))
    for shard in corpus.shards:
        verdicts = pq.read_table(io.BytesIO(read_bytes(output.join("selection", "selection", f"{shard.name}.parquet"))))
        reason_of = dict(zip(verdicts["key"].to_pylist(), verdicts["reason"].to_pylist(), strict=True))
        for sample in iter_samples(shard.path):
            has_text = bool(json.loads(sample.metadata)["written"])
            total[has_text] += 1
            dropped[has_text] += reason_of[sample.key] == TEXT_AREA
    return {"recall": dropped[True] / max(total[True], 1), "false_positives": dropped[False] / max(total[False], 1)}


def _table(results: dict[str, Any]) -> str:
    titles = {"clean": "clean scenes, top-1", "retrieval": "retrieval, mean R@1", "attacked": "a wrong word on it, top-1"}
    lines = [f"\n{'':28}{'raw':>10}{'filtered':>10}{'points':>10}"]
    for column, title in titles.items():
        raw, filtered = results["raw"][column], results["filtered"][column]
        lines.append(f"{title:28}{raw:>10.1%}{filtered:>10.1%}{100 * (filtered - raw):>+10.1f}")
    detector = results["text_detector"]
    lines.append(
        f"text filter against the truth: recall {detector['recall']:.1%}, false positives {detector['false_positives']:.1%}\n"
    )
    return "\n".join(lines)
