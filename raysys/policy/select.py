"""``raysys filter``: annotations + policy -> a selection, one Parquet file a shard, with counts by reason.

In: a finished annotations folder. Out: ``S/selection/<shard>.parquet`` (shard, index, key, keep, reason), and filtered shards
where asked for. No Ray: a million rows take a second.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import FilterConfig, PolicyConfig
from raysys.corpus.shards import Corpus, same_corpus
from raysys.policy.policy import COLUMNS, judge
from raysys.progress import Progress
from raysys.storage import (
    Output,
    UserError,
    absolute,
    identity,
    join,
    mask,
    open_fs,
    open_output,
    read_json,
    require_finished,
    settings_of,
    shard_name,
    write_bytes,
)


@dataclass
class Annotations:
    """A finished annotations folder."""

    path: str
    root: str
    """Corpus root at the time of the look."""
    ocr: dict[str, Any]
    fingerprint: str
    names: list[str]
    """Percent-encoded names of the shards, sorted."""

    def read(self, name: str, columns: list[str]) -> pa.Table:
        return read_parquet(join(self.path, "shards", f"{name}.parquet"), columns)


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    fs, inner = open_fs(path)
    with fs.open(inner, "rb") as file:
        return pq.read_table(file, columns=columns)


def open_annotations(path: str) -> Annotations:
    """:raises UserError: where the folder is missing, foreign or unfinished."""
    path = absolute(path)
    require_finished(path, "annotate")
    head = read_json(join(path, "settings.json"))
    fs, folder = open_fs(join(path, "shards"))
    files = [f.rsplit("/", 1)[-1] for f in fs.ls(folder, detail=False)]
    names = sorted(f.removesuffix(".parquet") for f in files if f.endswith(".parquet"))
    return Annotations(path, head["settings"]["corpus"]["root"], head["settings"]["ocr"], head["fingerprint"], names)


def refuse_what_was_not_stored(policy: PolicyConfig, annotations: Annotations) -> None:
    """:raises UserError: where the policy asks for evidence that the annotations do not hold."""
    stored = annotations.ocr["store_score"]
    if policy.min_score < stored:
        raise UserError(
            f"policy.min_score={policy.min_score} is below ocr.store_score={stored} of {mask(annotations.path)}; ask for {stored} or more"
        )
    asks_for_text = policy.min_text_score > 0 or policy.min_text_chars > 0 or policy.max_caption_overlap < 1
    if asks_for_text and not annotations.ocr["recognize"]:
        raise UserError(
            f"{mask(annotations.path)} was made with ocr.recognize=false; "
            "set policy.min_text_score=0 policy.min_text_chars=0 policy.max_caption_overlap=1, or annotate with recognition"
        )


def refuse_changed_shard(path: str, table: pa.Table) -> None:
    """:raises UserError: where the shard is not the one that was looked at: its offsets would read garbage."""
    then = table.schema.metadata[b"raysys.identity"].decode()
    try:
        now = identity(path)
    except FileNotFoundError as error:
        raise UserError(f"{mask(path)}: no such shard") from error
    if then != now:
        raise UserError(f"{mask(path)}: changed since it was annotated (size:time {then} then, {now} now); annotate it again")


def select(annotations: Annotations, policy: PolicyConfig) -> Iterator[tuple[str, pa.Table]]:
    """Name and verdicts (shard, index, key, keep, reason) of every shard."""
    refuse_what_was_not_stored(policy, annotations)
    for name in annotations.names:
        table = annotations.read(name, ["shard", "index", "key", *COLUMNS])
        verdict = judge(table, policy)
        yield (
            name,
            pa.table({**{c: table[c] for c in ("shard", "index", "key")}, "keep": verdict["keep"], "reason": verdict["reason"]}),
        )


def filter_annotations(cfg: FilterConfig) -> None:
    annotations = open_annotations(cfg.annotations)
    settings = settings_of(cfg, "shards") | {"annotations": annotations.path, "annotations_fingerprint": annotations.fingerprint}
    refuse_what_was_not_stored(cfg.policy, annotations)
    output = open_output(cfg.output, "filter", settings)
    if output.finished:
        print("filter: nothing is left to do, the selection is finished")
    else:
        _write_selection(annotations, cfg.policy, output)
    counts = read_json(output.join("manifest.json"))["counts"]
    print(
        f"filter: policy {cfg.policy.name} keeps {counts['kept']} of {counts['samples']} samples ({counts['kept'] / counts['samples']:.1%})"
    )
    for reason, number in sorted(counts["reasons"].items(), key=lambda item: -item[1]):
        print(f"filter: {number} dropped: {reason}")
    if cfg.shards is not None:
        written = write_shards(annotations, output, absolute(cfg.shards))
        print(f"filter: {written} samples in shards in {cfg.shards}")
    print(f"result: {output.path}")
    print(f"next:   raysys train corpus.path={annotations.root} selection={output.path} model=MODEL train.steps=N output=RUN")


def _write_selection(annotations: Annotations, policy: PolicyConfig, output: Output) -> None:
    counts: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    for name, verdicts in select(annotations, policy):
        buffer = io.BytesIO()
        pq.write_table(verdicts, buffer)
        write_bytes(output.join("selection", f"{name}.parquet"), buffer.getvalue(), tmp_folder=output.join("_tmp"))
        counts.update(samples=verdicts.num_rows, kept=int(np.count_nonzero(verdicts["keep"].to_numpy())))
        reasons.update(r for r in verdicts["reason"].to_pylist() if r is not None)
    output.finish({"samples": counts["samples"], "kept": counts["kept"], "reasons": dict(reasons)}, policy=asdict(policy))


@dataclass
class Selection:
    path: str
    annotations: Annotations

    def keep(self, name: str) -> np.ndarray:
        """bool [rows of the shard]."""
        return read_parquet(join(self.path, "selection", f"{name}.parquet"), ["keep"])["keep"].to_numpy()


def open_selection(path: str) -> Selection:
    """:raises UserError: where it is missing or unfinished, or its annotations were made anew since."""
    path = absolute(path)
    require_finished(path, "filter")
    settings = read_json(join(path, "settings.json"))["settings"]
    annotations = open_annotations(settings["annotations"])
    if annotations.fingerprint != settings["annotations_fingerprint"]:
        raise UserError(f"{mask(path)}: its annotations {annotations.path} have other settings now; filter them again")
    return Selection(path, annotations)


def write_shards(annotations: Annotations, output: Output, folder: str) -> int:
    """Copy the kept samples into tars of the same names, original bytes untouched; a shard that is there is done.

    :returns: number of samples written now or before.
    """
    corpus: Corpus = same_corpus(annotations.root, annotations.root, annotations.names)
    by_name = {shard_name(s): s for s in corpus.shards}
    progress = Progress("filter", len(annotations.names), "shards")
    written = 0
    for name in annotations.names:
        table = annotations.read(name, ["key"])
        verdicts = read_parquet(output.join("selection", f"{name}.parquet"), ["key", "keep"])
        kept = set(verdicts.filter(verdicts["keep"])["key"].to_pylist())
        written += len(kept)
        target, source = join(folder, by_name[name]), corpus.path(by_name[name])
        refuse_changed_shard(source, table)
        fs, inner = open_fs(target)
        if kept and not fs.exists(inner):
            write_bytes(target, _copy_members(source, kept))
        progress.advance()
    progress.close()
    return written


def _copy_members(source: str, keys: set[str]) -> bytes:
    """A tar with the members of the kept keys, headers and bytes as they were."""
    fs, inner = open_fs(source)
    buffer = io.BytesIO()
    with fs.open(inner, "rb") as file, tarfile.open(fileobj=file, mode="r:") as old, tarfile.open(fileobj=buffer, mode="w") as new:
        for member in old:
            head, name = os.path.split(member.name)
            key = os.path.join(head, name.partition(".")[0])
            if member.isfile() and key in keys:
                new.addfile(member, old.extractfile(member))
    return buffer.getvalue()
