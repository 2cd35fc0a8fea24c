"""What a run trains on: the words ``annotations`` + ``policy``, ``selection``, or neither -> the index of the kept samples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.config import TrainConfig
from raysys.corpus.images import MISSING_IMAGE
from raysys.corpus.index import SampleIndex, ShardRows, build_index
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import Corpus, iter_samples, open_corpus
from raysys.policy.policy import COLUMNS, NO_CAPTION, judge
from raysys.policy.select import open_selection, refuse_what_was_not_stored
from raysys.regions.annotations import Annotations, annotated_shards, head_of, open_annotations, refuse_changed_shard
from raysys.storage import UserError, mask


def choose_samples(cfg: TrainConfig) -> tuple[SampleIndex, dict[str, Any]]:
    """The samples to train on, and which evidence they rest on (for the run's fingerprint).

    :raises UserError: where the evidence is missing or unfinished, does not fit the corpus, or leaves less than a batch.
    """
    evidence: dict[str, Any]
    corpus = _readable(open_corpus(cfg.corpus))
    if cfg.selection is not None:
        selection = open_selection(cfg.selection)
        index = _from_annotations(corpus, selection.annotations, selection.keep, None)
        evidence = {"selection": selection.path, "annotations": selection.annotations.fingerprint}
    elif cfg.annotations is not None:
        annotations = open_annotations(cfg.annotations)
        refuse_what_was_not_stored(cfg.policy, annotations)
        index = _from_annotations(corpus, annotations, None, cfg)
        evidence = {"annotations": annotations.fingerprint}
    else:
        index = _from_shards(corpus)
        evidence = {}
    if len(index) < cfg.global_batch:
        raise UserError(
            f"{len(index)} of {index.num_samples_before} samples are kept, fewer than global_batch={cfg.global_batch}; "
            "loosen the policy or take a smaller batch"
        )
    return index, evidence


def _readable(corpus: Corpus) -> Corpus:
    """:raises UserError: where the format has no places that training could read pictures from."""
    other = next((shard for shard in corpus.shards if not shard.path.endswith(".tar")), None)
    if other is not None:
        raise UserError(
            f"{mask(other.path)}: train reads WebDataset tars only; write the kept samples as tars with "
            "`raysys filter annotations=A policy=P output=S shards=DIR`, then train corpus.path=DIR"
        )
    return corpus


def _from_annotations(corpus: Corpus, annotations: Annotations, keep_of: Any, cfg: TrainConfig | None) -> SampleIndex:
    """Rows of all annotated shards; ``keep_of(name)`` of a selection decides, or the policy of ``cfg``."""
    annotated = annotated_shards(corpus, annotations)
    unknown = next((shard.name for shard in corpus.shards if shard.name not in annotated), None)
    if unknown is not None:
        raise UserError(f"shard {unknown} of the corpus is not annotated; run raysys annotate over the whole corpus")
    shards = []
    for name, shard in annotated.items():
        table = annotations.read(name, ["offset", "size", *COLUMNS])
        refuse_changed_shard(shard.path, head_of(table).identity, shard.identity)
        if keep_of is not None:
            keep, reasons = keep_of(name), Counter[str]()
        else:
            assert cfg is not None
            verdict = judge(table, cfg.policy)
            keep = verdict["keep"].to_numpy()
            reasons = Counter(r for r in verdict["reason"].to_pylist() if r is not None)
        captions = table["caption"].combine_chunks()
        shards.append(ShardRows(shard.path, table["offset"].to_numpy(), table["size"].to_numpy(), captions, keep, reasons))
    return build_index(shards)


def _from_shards(corpus: Corpus) -> SampleIndex:
    """Every sample of the corpus: one pass over the tars."""
    shards = []
    for shard in corpus.shards:
        path = shard.path
        samples: list[tuple[int, int, list[str]]] = []
        try:
            samples.extend((s.offset, s.size, s.captions) for s in iter_samples(path))
        except DamagedShard as error:
            raise UserError(f"{path}: {error}; raysys annotate keeps the good part of a damaged shard") from error
        offset = np.array([o for o, _, _ in samples], dtype=np.int64)
        size = np.array([s for _, s, _ in samples], dtype=np.int64)
        captions = pa.array([c for _, _, c in samples], pa.list_(pa.string()))
        captioned = np.array([len(c) for _, _, c in samples], dtype=np.int64) > 0
        reasons = Counter({MISSING_IMAGE: int((offset < 0).sum()), NO_CAPTION: int(((offset >= 0) & ~captioned).sum())})
        shards.append(ShardRows(path, offset, size, captions, (offset >= 0) & captioned, +reasons))
    return build_index(shards)
