"""``raysys filter``: annotations + policy -> a selection, one Parquet file a shard, with counts by reason.

    S/settings.json            which annotations, which policy
    S/selection/NAME.parquet   shard, index, key, keep, reason: a row for every row of A/shards/NAME.parquet; no other Parquet is in S
    S/shards.arrow             a line a shard: rows, kept ones, and which file it was
    S/subset.npy               the kept samples as a subset file of DataComp, where they have uids
    S/tensorboard              of `raysys filter`: shares, and pictures of what is kept and dropped; the verdicts that train makes have none
    S/manifest.json            counts, and the sha256 of A/manifest.json; written last

In: a finished annotations folder. Out: S, and filtered shards where asked for (:mod:`raysys.policy.export`). The corpus is listed, to see
that it is the one that was annotated; no shard and no picture is opened, but for the few dozen that TensorBoard shows. No Ray: a million
rows take a second.
"""

from __future__ import annotations

import hashlib
import os
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysys.config import CorpusConfig, FilterConfig, PolicyConfig
from raysys.console import Progress, say, tell_result, warn
from raysys.corpus.index import SHARDS_FILE, SHARDS_SCHEMA, write_shards_table
from raysys.corpus.prefetch import prefetch
from raysys.corpus.shards import open_corpus, refuse_output_in_corpus, shard_path
from raysys.errors import UserError
from raysys.masking import mask, resolved
from raysys.output import Output, open_output, require_finished
from raysys.policy.export import write_shards
from raysys.policy.on_board import write_board
from raysys.policy.policy import COLUMNS, judge
from raysys.policy.subset import UID, SortedUids
from raysys.regions.annotations import Annotations, head_of, open_annotations, read_heads, read_parquet
from raysys.storage import (
    absolute,
    exists,
    find_files,
    is_local,
    join,
    list_names,
    read_bytes,
    read_json,
    remove_folder,
    shard_name,
    writing,
)

SHARDS_AT_ONCE = 4
"""Shards that are read, judged and written beside each other; so many are in memory."""
SELECTION_COLUMNS = ("shard", "index", "key", "keep", "reason")


# ---- the decision -----------------------------------------------------------------------------------------------------


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


def select(annotations: Annotations, name: str, policy: PolicyConfig) -> pa.Table:
    """Verdicts on one shard: ``SELECTION_COLUMNS`` and ``uid``, a row for every annotated sample, in order."""
    table = annotations.read(name, ["shard", "index", "key", "uid", *COLUMNS])
    verdict = judge(table, policy)
    of_sample = {column: table[column] for column in ("shard", "index", "key", "uid")}
    verdicts = pa.table({**of_sample, "keep": verdict["keep"], "reason": verdict["reason"]})
    return verdicts.replace_schema_metadata(table.schema.metadata)


@dataclass
class _Judged:
    """What came of a shard."""

    line: dict[str, Any]
    """Of ``SHARDS_SCHEMA``."""
    reasons: Counter[str]
    uids: np.ndarray
    """``UID`` [kept samples that have one]"""

    @classmethod
    def of(cls, name: str, verdicts: pa.Table) -> _Judged:
        reasons = pc.value_counts(verdicts["reason"].drop_null()).to_pylist()
        kept = pc.sum(verdicts["keep"]).as_py() or 0
        line = {"name": name, "rows": verdicts.num_rows, "kept": kept, "identity": head_of(verdicts).identity}
        return cls(
            line, Counter({r["values"]: r["counts"] for r in reasons}), decode_uids(verdicts["uid"].filter(verdicts["keep"]))
        )


def decode_uids(uids: pa.ChunkedArray) -> np.ndarray:
    """``UID`` [values of 32 hex digits]; other values and nulls are left out."""
    good = uids.filter(pc.match_substring_regex(uids, "^[0-9a-fA-F]{32}$")).combine_chunks()
    digits = good.cast(pa.binary()).cast(pa.binary(32))  # of one width: one buffer without gaps
    if len(digits) == 0:
        return np.zeros(0, UID)
    buffer = digits.buffers()[1].slice(32 * digits.offset, 32 * len(digits))
    return np.frombuffer(bytes.fromhex(buffer.to_pybytes().decode()), ">u8").astype("u8").view(UID)


# ---- the verb ---------------------------------------------------------------------------------------------------------


def filter_annotations(cfg: FilterConfig) -> None:
    annotations = open_annotations(cfg.annotations)
    corpus = cfg.corpus if cfg.corpus.path is not None or cfg.corpus.sources else annotations.corpus
    for word, folder in (("output", cfg.output), ("shards", cfg.shards)):
        if folder is not None:
            refuse_output_in_corpus(word, folder, corpus)
    refuse_what_was_not_stored(cfg.policy, annotations)
    roots = find_corpus(annotations, cfg.corpus, needed=cfg.shards is not None)
    output = make_selection(annotations, cfg.policy, cfg.output)
    if not list_names(output.join("tensorboard")):
        write_board(output.path, annotations, roots, cfg.policy, read_json(output.join("manifest.json"))["counts"])
    if cfg.shards is not None:
        made_of = {
            "selection": output.fingerprint,
            "annotations_sha256": read_json(output.join("manifest.json"))["annotations_sha256"],
        }
        written = write_shards(cfg.shards, annotations, Selection(output.path, annotations).keep_by_index, roots, made_of)
        say(f"filter: {written.samples} samples in {written.shards} shards in {mask(absolute(cfg.shards))}")
    if cfg.shards is not None:
        words = f"corpus.path={shlex.quote(mask(absolute(cfg.shards)))}"
    else:
        words = f"{_corpus_words(corpus)} selection={shlex.quote(mask(output.path))}"
    next_words = f"raysys train {words} model=MODEL train.steps=N output=RUN"
    if cfg.shards is None and not all(name.endswith(".tar") for name in annotations.names):
        next_words = "the same words with shards=FOLDER: training reads tars, this writes the kept samples as such"
    tell_result(mask(output.path), next_words=next_words)


def make_selection(annotations: Annotations, policy: PolicyConfig, path: str) -> Output:
    """Judge every row, unless that is done already, and print the counts.

    :raises UserError: where the policy asks for what was not stored, or ``path`` is another's.
    """
    refuse_what_was_not_stored(policy, annotations)
    sha256 = annotations_sha256(annotations)  # before the first row is read: annotate may be at work there
    settings = {"annotations": annotations.path, "policy": asdict(policy), "annotations_fingerprint": annotations.fingerprint}
    output = open_output(path, "filter", settings)
    if not output.finished:
        _write_selection(annotations, sha256, policy, output)
    elif read_json(output.join("manifest.json")).get("annotations_sha256") != sha256 or not exists(output.join(SHARDS_FILE)):
        say("filter: the annotations changed since this selection was made; it is made anew")
        _write_selection(annotations, sha256, policy, output)
    else:
        say("filter: nothing is left to do, the selection is finished")
    _print_counts(policy, output)
    return output


def find_corpus(annotations: Annotations, now: CorpusConfig, *, needed: bool) -> dict[str, str]:
    """Compare every annotated shard with the corpus: one listing a source, and the footers of the annotations.

    :param now: where the corpus lies now; empty for where it was annotated, which need not be in reach unless it is ``needed``.
    :returns: the roots of the sources.
    :raises UserError: where a shard changed or is missing.
    """
    if now.path is not None or now.sources:
        corpus = open_corpus(now)
        roots, names = corpus.roots, annotations.names
        listed = {shard.name: shard.identity for shard in corpus.shards}
        if roots.keys() != annotations.roots.keys():
            then = ", ".join(annotations.roots) if "" not in annotations.roots else "one corpus.path"
            raise UserError(f"{mask(annotations.path)} was made of other sources ({then}); name the same")
    else:
        roots = annotations.roots
        names, listed = _list_where_annotated(annotations, needed=needed)
    heads = read_heads([annotations.file(name) for name in names])
    bad = [(name, head.identity) for name, head in zip(names, heads, strict=True) if head.identity != listed.get(name)]
    if bad:
        name, made_of = bad[0]
        if name in listed:
            what = f"(size:time {made_of} then, {listed[name]} now); annotate again"
        else:
            what = f"(it is not there); bring it back, or delete {mask(annotations.file(name))} and annotate again"
        raise UserError(
            f"{len(bad)} of {len(annotations.names)} annotated shards changed since or are missing, {mask(shard_path(roots, name))} "
            f"first {what}"
        )
    return roots


def _list_where_annotated(annotations: Annotations, *, needed: bool) -> tuple[list[str], dict[str, str]]:
    """Names of the annotated shards whose root can be reached, and name -> identity of what lies there."""
    names: list[str] = []
    listed: dict[str, str] = {}
    for source, root in annotations.roots.items():
        prefix = shard_name(f"{source}/") if source else ""
        of_source = [name for name in annotations.names if name.startswith(prefix)]
        try:
            _, files = find_files(root, tuple({os.path.splitext(unquote(name))[1] for name in of_source}))
        except (UserError, OSError) as error:
            if needed:
                raise UserError(f"shards= copies from the corpus; say with corpus.path= where it lies now ({error})") from error
            warn(f"filter: could not check that the corpus is as it was annotated: {error}")
            continue
        names += of_source
        listed |= {shard_name(join(source, file.path) if source else file.path): file.identity for file in files}
    return names, listed


def _write_selection(annotations: Annotations, sha256: str, policy: PolicyConfig, output: Output) -> None:
    for stale in ("selection", "subset.npy", SHARDS_FILE, "tensorboard"):
        remove_folder(output.join(stale))

    tmp_folder = output.join("_tmp")

    def write(name: str) -> _Judged:
        verdicts = select(annotations, name, policy)
        with writing(output.join("selection", f"{name}.parquet"), tmp_folder=tmp_folder) as file:
            pq.write_table(verdicts.select(SELECTION_COLUMNS).replace_schema_metadata(), file)
        return _Judged.of(name, verdicts)

    lines: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    with SortedUids(tmp_folder if is_local(output.path) else None) as uids:
        with Progress("filter", len(annotations.names), "shards") as progress:
            for judged in prefetch(annotations.names, write, threads=SHARDS_AT_ONCE, ahead=SHARDS_AT_ONCE):
                lines.append(judged.line)
                reasons.update(judged.reasons)
                uids.add(judged.uids)
                progress.advance(items=judged.line["rows"])
        if len(uids):
            uids.write(output.join("subset.npy"), tmp_folder=tmp_folder)
        kept_with_uid = len(uids)
    shards = pa.Table.from_pylist(lines, SHARDS_SCHEMA)
    write_shards_table(output.path, shards, tmp_folder=tmp_folder)
    remove_folder(tmp_folder)
    samples, kept = (pc.sum(shards[column]).as_py() or 0 for column in ("rows", "kept"))
    counts = {"samples": samples, "kept": kept, "reasons": dict(reasons)}
    output.finish(counts, kept_with_uid=kept_with_uid, policy=asdict(policy), annotations_sha256=sha256)


def _print_counts(policy: PolicyConfig, output: Output) -> None:
    manifest = read_json(output.join("manifest.json"))
    counts = manifest["counts"]
    share = counts["kept"] / max(counts["samples"], 1)
    say(f"filter: policy {policy.name} keeps {counts['kept']} of {counts['samples']} samples ({share:.1%})")
    for reason, number in sorted(counts["reasons"].items(), key=lambda item: (-item[1], item[0])):
        say(f"filter: {number} dropped: {reason}")
    if manifest["kept_with_uid"]:
        without = counts["kept"] - manifest["kept_with_uid"]
        note = f" ({without} kept samples have no uid and are not in it)" if without else ""
        say(f"filter: DataComp subset: {mask(output.join('subset.npy'))}{note}")


def _corpus_words(corpus: CorpusConfig) -> str:
    """The words that name the corpus to another verb."""
    if corpus.path is not None:
        return f"corpus.path={shlex.quote(mask(corpus.path))}"
    return " ".join(f"corpus.sources.{name}.path={shlex.quote(mask(source.path))}" for name, source in corpus.sources.items())


# ---- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Selection:
    path: str
    annotations: Annotations

    def keep(self, name: str) -> np.ndarray:
        """bool [rows of the shard's annotations]."""
        return self._read(name, "keep")

    def keep_by_index(self, name: str) -> np.ndarray:
        """bool [samples of the shard]: a damaged shard may have no rows for some of its samples."""
        index, keep = self._read(name, "index"), self.keep(name)
        by_index = np.zeros(index.max(initial=-1) + 1, dtype=bool)
        by_index[index] = keep
        return by_index

    def _read(self, name: str, column: str) -> np.ndarray:
        return read_parquet(join(self.path, "selection", f"{name}.parquet"), [column])[column].to_numpy()


def open_selection(path: str) -> Selection:
    """:raises UserError: where it is missing or unfinished, or its annotations changed since."""
    path = absolute(path)
    manifest = require_finished(path, "filter")
    settings: dict[str, Any] = resolved(read_json(join(path, "settings.json"))["settings"])
    annotations = open_annotations(settings["annotations"])
    if annotations.fingerprint != settings["annotations_fingerprint"]:
        raise UserError(
            f"{mask(path)}: its annotations {mask(annotations.path)} have other settings now; run raysys filter into a new folder"
        )
    if manifest.get("annotations_sha256") != annotations_sha256(annotations):
        raise UserError(
            f"{mask(path)}: its annotations {mask(annotations.path)} changed since it was made ({manifest['finished']}); "
            "run raysys filter again"
        )
    return Selection(path, annotations)


def annotations_sha256(annotations: Annotations) -> str:
    """Changes when the annotations do: annotate writes its manifest after it wrote rows, and only then."""
    return hashlib.sha256(read_bytes(join(annotations.path, "manifest.json"))).hexdigest()
