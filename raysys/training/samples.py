"""What a run trains on: the words ``annotations`` + ``policy``, ``selection``, or neither -> the index of the kept samples.

The verdicts of a policy are a selection in ``R/selection``, as ``raysys filter`` writes it; where there are no annotations, ``R/index`` gets
the places and captions of all samples. Both are made once: a run that is taken up again reads them.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raysys.config import CorpusConfig, TrainConfig
from raysys.console import Progress
from raysys.corpus.images import MISSING_IMAGE
from raysys.corpus.index import SHARDS_FILE, SHARDS_SCHEMA, SampleIndex, read_shards_table, write_shards_table
from raysys.corpus.order import Order, Source
from raysys.corpus.prefetch import prefetch
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import Corpus, Shard, iter_samples, open_corpus
from raysys.errors import UserError
from raysys.masking import mask
from raysys.policy.policy import NO_CAPTION
from raysys.policy.select import annotations_sha256, make_selection, open_selection, refuse_what_was_not_stored
from raysys.regions.annotations import open_annotations
from raysys.storage import exists, join, read_json, remove_folder, shard_name, write_json, writing

SHARDS_AT_ONCE = 4
"""Shards that are scanned beside each other."""
_ROWS = pa.schema([("offset", pa.int64()), ("size", pa.int64()), ("caption", pa.list_(pa.string()))])


def check_evidence(cfg: TrainConfig) -> dict[str, Any]:
    """Which evidence the run rests on, for its fingerprint; nothing is judged or written yet.

    :raises UserError: where it is missing or unfinished, or does not hold what the policy asks for.
    """
    weights = weighted_sources(cfg.corpus)
    evidence: dict[str, Any] = {"weights": weights} if weights else {}
    if cfg.selection is not None:
        selection = open_selection(cfg.selection)
        annotations = selection.annotations
        evidence["selection"] = read_json(join(selection.path, "settings.json"))["settings"]["policy"]
    elif cfg.annotations is not None:
        annotations = open_annotations(cfg.annotations)
        refuse_what_was_not_stored(cfg.policy, annotations)
    else:
        return evidence
    return evidence | {"annotations": annotations.fingerprint, "annotations_sha256": annotations_sha256(annotations)}


def choose_samples(cfg: TrainConfig, place: str) -> SampleIndex:
    """The samples to train on.

    :param place: folder that takes the selection or the index, a run's or one that runs with the same evidence and policy share.
    :raises UserError: where the evidence does not fit the corpus, or leaves less than a batch.
    """
    corpus = _readable(open_corpus(cfg.corpus))
    if cfg.selection is None and cfg.annotations is None:
        folder = join(place, "index")
        if not exists(join(folder, SHARDS_FILE)):
            _scan(corpus, folder)
        rows_folder, keep_folder = join(folder, "shards"), None
        counts = read_json(join(folder, "counts.json"))
    else:
        folder = cfg.selection or make_selection(open_annotations(str(cfg.annotations)), cfg.policy, join(place, "selection")).path
        selection = open_selection(folder)
        rows_folder, keep_folder = join(selection.annotations.path, "shards"), join(selection.path, "selection")
        counts = read_json(join(selection.path, "manifest.json"))["counts"]
    try:
        table = read_shards_table(folder)
    except FileNotFoundError as error:
        raise UserError(
            f"{mask(folder)}: has no {SHARDS_FILE}, an older raysys made it; run raysys filter again with the same words"
        ) from error
    shards = _matching_shards(table, corpus)
    return SampleIndex(
        roots=corpus.roots,
        names=table["name"].combine_chunks(),
        kept=table["kept"].to_numpy(),
        size=np.array([shard.size for shard in shards], dtype=np.int64),
        rows_folder=rows_folder,
        keep_folder=keep_folder,
        num_samples_before=counts["samples"],
        reasons=counts["reasons"],
    )


def order_of(cfg: TrainConfig, index: SampleIndex) -> Order:
    """The order of a run. :raises UserError: where a batch asks for more than is kept."""
    try:
        return Order(
            index.kept,
            index.size,
            sources=_sources(cfg.corpus, index),
            global_batch=cfg.global_batch,
            lanes=cfg.order.lanes,
            block_bytes=cfg.order.block_mb * 1e6,
            window_bytes=cfg.order.window_mb * 1e6,
            seed=cfg.seed,
            factor=cfg.augment.factor,
        )
    except ValueError as error:
        raise UserError(
            f"{len(index)} of {index.num_samples_before} samples are kept: {error}; loosen the policy or take a smaller batch"
        ) from error


def weighted_sources(corpus: CorpusConfig) -> dict[str, float]:
    """Names and weights, in the order of their shards; none where the sources have no weight."""
    weights = {name: source.weight for name, source in corpus.sources.items() if source.weight is not None}
    return dict(sorted(weights.items(), key=lambda item: shard_name(f"{item[0]}/")))


def _sources(corpus: CorpusConfig, index: SampleIndex) -> list[Source]:
    """Sources with a weight; their shards stand together, as names begin with the source's."""
    names = np.array(index.names.to_pylist())
    sources = []
    for name, weight in weighted_sources(corpus).items():
        mine = np.flatnonzero(np.char.startswith(names, shard_name(f"{name}/")))
        sources.append(Source(int(mine[0]), int(mine[-1]) + 1, weight))
    return sources


def _readable(corpus: Corpus) -> Corpus:
    """:raises UserError: where the format has no places that training could read pictures from."""
    other = next((shard for shard in corpus.shards if not shard.path.endswith(".tar")), None)
    if other is not None:
        raise UserError(
            f"{mask(other.path)}: train reads WebDataset tars only; write the kept samples as tars with "
            "`raysys filter annotations=A policy=P output=S shards=DIR`, then train corpus.path=DIR"
        )
    return corpus


def _matching_shards(table: pa.Table, corpus: Corpus) -> list[Shard]:
    """The corpus's shards in the order of the table. :raises UserError: where they are not those that the offsets were taken of."""
    listed = {shard.name: shard for shard in corpus.shards}
    names, identities = table["name"].to_pylist(), table["identity"].to_pylist()
    missing = [name for name in names if name not in listed]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(names)} shards that were annotated (or indexed) are not in the corpus, {missing[0]} first; bring them back"
        )
    unknown = sorted(listed.keys() - set(names))
    if unknown:
        raise UserError(
            f"{len(unknown)} shards of the corpus are not annotated, {unknown[0]} first; run raysys annotate over the whole corpus, "
            "or begin a new run where there are no annotations"
        )
    changed = [(listed[name], made_of) for name, made_of in zip(names, identities, strict=True) if listed[name].identity != made_of]
    if changed:
        shard, made_of = changed[0]
        raise UserError(
            f"{len(changed)} of {len(names)} shards changed since their offsets were taken, {mask(shard.path)} first "
            f"(size:time {made_of} then, {shard.identity} now); annotate again, or begin a new run where there are no annotations"
        )
    return [listed[name] for name in names]


# ---- a corpus without annotations -------------------------------------------------------------------------------------


def _scan(corpus: Corpus, folder: str) -> None:
    """Places and captions of every sample that can be trained on: one pass over the tars.

    :raises UserError: where a shard is damaged.
    """
    remove_folder(folder)

    def scan(shard: Shard) -> tuple[dict[str, Any], Counter[str]]:
        rows: list[dict[str, Any]] = []
        reasons: Counter[str] = Counter()
        try:
            for sample in iter_samples(shard.path):
                reason = MISSING_IMAGE if sample.offset < 0 else sample.error or (None if sample.captions else NO_CAPTION)
                if reason is not None:
                    reasons[reason] += 1
                else:
                    rows.append({"offset": sample.offset, "size": sample.size, "caption": sample.captions})
        except DamagedShard as error:
            raise UserError(f"{mask(shard.path)}: {error}; raysys annotate keeps the good part of a damaged shard") from error
        with writing(join(folder, "shards", f"{shard.name}.parquet"), tmp_folder=join(folder, "_tmp")) as file:
            pq.write_table(pa.Table.from_pylist(rows, _ROWS), file, row_group_size=2_000)
        return {"name": shard.name, "rows": len(rows), "kept": len(rows), "identity": shard.identity}, reasons

    lines, reasons = [], Counter[str]()
    with Progress("index", len(corpus.shards), "shards") as progress:
        for line, of_shard in prefetch(corpus.shards, scan, threads=SHARDS_AT_ONCE, ahead=SHARDS_AT_ONCE):
            lines.append(line)
            reasons += of_shard
            progress.advance(items=line["rows"])
    samples = sum(line["rows"] for line in lines) + reasons.total()
    write_json(join(folder, "counts.json"), {"samples": samples, "reasons": dict(reasons)})
    write_shards_table(folder, pa.Table.from_pylist(lines, SHARDS_SCHEMA), tmp_folder=join(folder, "_tmp"))
    remove_folder(join(folder, "_tmp"))
