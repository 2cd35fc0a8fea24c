"""``raysys annotate``: Ray Data maps a pool of OCR actors over the shards.

One row of the data set is one shard: the actor streams the tar, catches what broken pictures raise, and writes one Parquet file whole
or not at all. A shard is done when its file is there, so a rerun does what is left, and a late zombie writes the same bytes again.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pyarrow.parquet as pq
import ray
from ray.data import ActorPoolStrategy

from raysys.cluster import num_cpus, ray_session, require
from raysys.config import POOL_KEYS, AnnotateConfig, OcrConfig
from raysys.corpus.shards import Corpus, open_corpus
from raysys.progress import Progress
from raysys.regions.annotator import Annotator, annotate_shard, count, to_parquet
from raysys.regions.models import find_models
from raysys.storage import Output, UserError, join, open_fs, open_output, settings_of, shard_name, write_bytes


class ShardAnnotator:
    """One OCR actor: a shard in, its Parquet file on storage, its counts out."""

    def __init__(self, ocr: OcrConfig, folder: str, fingerprint: str) -> None:
        self._folder, self._fingerprint = folder, fingerprint
        self._annotator: Annotator | Exception
        try:
            self._annotator = Annotator(ocr)
        except Exception as error:  # raised by the first call: an actor that dies at birth is born again by Ray, without end
            self._annotator = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if isinstance(self._annotator, UserError):
            return {"name": row["name"], "samples": 0, "refused": str(self._annotator)}
        if isinstance(self._annotator, Exception):
            raise self._annotator
        table = annotate_shard(row["path"], row["name"], self._annotator)
        data = to_parquet(table, fingerprint=self._fingerprint)
        write_bytes(join(self._folder, "shards", f"{row['name']}.parquet"), data, tmp_folder=join(self._folder, "_tmp"))
        return {"name": row["name"], "samples": table.num_rows, "refused": ""}


def annotate(cfg: AnnotateConfig) -> None:
    corpus = open_corpus(cfg.corpus.path)
    models = find_models(cfg.ocr)
    settings = settings_of(cfg) | {"models": models.sha256()}
    settings["corpus"] = {"path": cfg.corpus.path, "root": corpus.root}
    pool = {key: settings["ocr"].pop(key) for key in POOL_KEYS}
    output = open_output(cfg.output, "annotate", settings | {"pool": pool}, not_in_fingerprint=("pool", "corpus"))
    done = done_shards(output)
    todo = [s for s in corpus.shards if shard_name(s) not in done]
    if not todo:
        print(f"annotate: nothing is left to do, all {len(corpus.shards)} shards are annotated")
    else:
        if len(todo) < len(corpus.shards):
            print(f"annotate: {len(corpus.shards) - len(todo)} of {len(corpus.shards)} shards are done already")
        with ray_session(cfg.ray):
            _annotate_shards(cfg.ocr, corpus, todo, output)
    if todo or not output.finished:
        output.finish(counts_of(output))
    _print_summary(output)


def _annotate_shards(ocr: OcrConfig, corpus: Corpus, todo: list[str], output: Output) -> None:
    actors = min(ocr.num_actors or num_cpus(), len(todo))
    require(f"annotate with {actors} OCR actors", cpus=actors, gpus=actors * ocr.num_gpus_per_actor)
    rows = [{"path": corpus.path(shard), "name": shard_name(shard)} for shard in todo]
    looks = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        ShardAnnotator,  # type: ignore[arg-type]  # Ray takes a class here
        fn_constructor_args=(ocr, output.path, output.fingerprint),
        # Two shards an actor: while one is in the networks, the next is read and decoded (Annotator.look_all).
        compute=ActorPoolStrategy(
            size=actors, max_tasks_in_flight_per_actor=2, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
        ),
        num_cpus=1,
        num_gpus=ocr.num_gpus_per_actor,
    )
    progress = Progress("annotate", len(todo), "shards")
    for row in looks.iter_rows():
        if row["refused"]:
            raise UserError(row["refused"])
        progress.advance(items=row["samples"])
    progress.close()


def done_shards(output: Output) -> set[str]:
    """Names of the shards whose Parquet file is there (one listing)."""
    fs, folder = open_fs(output.join("shards"))
    if not fs.exists(folder):
        return set()
    return {file.rsplit("/", 1)[-1].removesuffix(".parquet") for file in fs.ls(folder, detail=False) if file.endswith(".parquet")}


def counts_of(output: Output) -> dict[str, Any]:
    """Counts over all shards. :raises UserError: where no shard could be read at all."""
    errors: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    damaged: dict[str, str] = {}
    for name in sorted(done_shards(output)):
        fs, path = open_fs(output.join("shards", f"{name}.parquet"))
        with fs.open(path, "rb") as file:
            shard = count(pq.read_table(file, columns=["regions", "error"]))
        totals.update(samples=shard.samples, shards=1, regions=shard.regions, with_regions=shard.with_regions)
        errors.update(shard.errors)
        if shard.damaged:
            damaged[name] = shard.damaged
    if totals["samples"] == 0:
        reasons = ", ".join(sorted(set(damaged.values()))) or "the shards are empty"
        raise UserError(f"no sample could be read from {totals['shards']} shards ({reasons}); is this a WebDataset?")
    return {**totals, "errors": dict(errors), "damaged_shards": damaged}


def _print_summary(output: Output) -> None:
    from raysys.storage import read_json

    counts = read_json(output.join("manifest.json"))["counts"]
    share = counts["with_regions"] / counts["samples"]
    print(
        f"annotate: {counts['samples']} samples in {counts['shards']} shards, {counts['regions']} text regions, in {share:.1%} of them"
    )
    for reason, number in sorted(counts["errors"].items()):
        print(f"annotate: {number} samples without a look: {reason}")
    for name, reason in sorted(counts["damaged_shards"].items()):
        print(f"annotate: shard {name} is damaged, its good part is kept: {reason}")
    print(f"result: {output.path}")
    print(f"next:   raysys filter annotations={output.path} policy=paper output=SELECTION")
