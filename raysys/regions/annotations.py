"""The files of an annotations folder A: rows -> Parquet files that say what they were made of, and back.

    A/settings.json            engine, model files, settings: before the first look
    A/shards/NAME.parquet      one row a sample, written whole or not at all; nothing else is ever in this folder
    A/_parts/NAME/             plan.json and the finished parts of a large shard, merged into A/shards by whoever finishes last
    A/_tmp/                    unfinished files
    A/manifest.json            counts; written last

Each Parquet file's metadata holds the fingerprint of the settings, the shard's identity, why it broke off, and its counts, so that a reader
of a million files reads a million footers and no rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raysys.config import CorpusConfig, PolicyConfig, SourceConfig
from raysys.corpus.prefetch import prefetch
from raysys.corpus.samples import DUPLICATE_KEY, Part, Plan
from raysys.corpus.shards import Corpus, Shard, shard_path
from raysys.errors import UserError
from raysys.masking import mask, resolved
from raysys.output import require_finished
from raysys.storage import (
    absolute,
    exists,
    find_files,
    identity,
    join,
    list_names,
    read_bytes,
    read_json,
    reading,
    remove_folder,
    write_new_json,
    writing,
)

REGION = pa.struct(
    [
        ("polygon", pa.list_(pa.float32(), 8)),
        ("score", pa.float32()),
        ("area", pa.float32()),
        ("text", pa.string()),
        ("text_score", pa.float32()),
    ]
)
SCHEMA = pa.schema(
    [
        ("shard", pa.string()),
        ("index", pa.int32()),
        ("key", pa.string()),
        ("uid", pa.string()),
        ("offset", pa.int64()),
        ("size", pa.int64()),
        ("caption", pa.list_(pa.string())),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("regions", pa.list_(REGION)),
        ("text_area", pa.float32()),
        ("error", pa.string()),
    ]
)
ROW_GROUP = 2_000
"""Rows: training reads places and captions a block at a time, a few hundred samples of a shard."""
REQUESTS = 32
"""Small files and footers read at once: each waits for storage, not for a CPU."""


@dataclass
class Counts:
    """What was seen in some samples."""

    samples: int = 0
    regions: int = 0
    with_regions: int = 0
    with_text: int = 0
    """Samples with a region that the default policy counts: read, and not only boxed."""
    without_caption: int = 0
    errors: dict[str, int] = field(default_factory=dict)

    def __iadd__(self, other: Counts) -> Counts:
        for name in ("samples", "regions", "with_regions", "with_text", "without_caption"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.errors = dict(Counter(self.errors) + Counter(other.errors))
        return self

    @classmethod
    def of(cls, table: pa.Table) -> Counts:
        lengths = pc.fill_null(pc.list_value_length(table["regions"]), 0)
        captions = pc.fill_null(pc.list_value_length(table["caption"]), 0)
        errors = table["error"].drop_null()
        no_caption = pc.and_(pc.equal(captions, 0), pc.is_null(table["error"]))
        regions = table["regions"].combine_chunks()
        return cls(
            table.num_rows,
            pc.sum(lengths).as_py() or 0,
            pc.sum(pc.greater(lengths, 0)).as_py() or 0,
            _with_text(regions),
            pc.sum(no_caption).as_py() or 0,
            {v["values"]: v["counts"] for v in pc.value_counts(errors).to_pylist()},
        )


def _with_text(regions: pa.ListArray) -> int:
    policy = PolicyConfig()
    flat = regions.flatten()
    rows = pc.list_parent_indices(regions).to_numpy()
    letters = pc.utf8_length(pc.replace_substring_regex(pc.fill_null(flat.field("text"), ""), r"[^\p{L}\p{N}]", ""))
    counting = (
        (pc.fill_null(flat.field("score"), 0).to_numpy(zero_copy_only=False) >= policy.min_score)
        & (pc.fill_null(flat.field("text_score"), 0).to_numpy(zero_copy_only=False) >= policy.min_text_score)
        & (letters.to_numpy(zero_copy_only=False) >= policy.min_text_chars)
    )
    return len(np.unique(rows[counting]))


@dataclass
class Head:
    """What a file of annotations says of itself."""

    fingerprint: str
    identity: str
    """Of the shard that was looked at."""
    damaged: str
    """Why the shard broke off; empty for a sound one."""
    counts: Counts

    def metadata(self) -> dict[str, str]:
        return {
            "raysys.fingerprint": self.fingerprint,
            "raysys.identity": self.identity,
            "raysys.damaged": self.damaged,
            "raysys.counts": json.dumps(asdict(self.counts)),
        }


def read_head(path: str) -> Head:
    """The footer of a file of annotations; no row is read."""
    with reading(path) as file:
        return _head(pq.ParquetFile(file).metadata.metadata)


def head_of(table: pa.Table) -> Head:
    """Of a table that :func:`read_parquet` read from a file of annotations."""
    return _head(table.schema.metadata)


def _head(metadata: dict[bytes, bytes]) -> Head:
    text = {key.decode(): value.decode() for key, value in metadata.items() if key.startswith(b"raysys.")}
    counts = Counts(**json.loads(text["raysys.counts"]))
    return Head(text["raysys.fingerprint"], text["raysys.identity"], text["raysys.damaged"], counts)


def read_heads(paths: list[str]) -> Iterator[Head]:
    """Heads of many files, in order; few are in memory, however many files there are."""
    return prefetch(paths, read_head, threads=REQUESTS, ahead=2 * REQUESTS)


# ---- writing ----------------------------------------------------------------------------------------------------------


@dataclass
class AnnotationFiles:
    """Writes the files of one folder; several processes may do the same work and leave the same files."""

    folder: str
    fingerprint: str

    def shard_file(self, name: str) -> str:
        return join(self.folder, "shards", f"{name}.parquet")

    def _parts(self, name: str) -> str:
        return join(self.folder, "_parts", name)

    def _part_file(self, name: str, plan: Plan, part: Part) -> str:
        mark = hashlib.sha256(plan.identity.encode()).hexdigest()[:8]
        return join(self._parts(name), f"{part.first}-{part.count}-{mark}.parquet")

    def head(self, name: str) -> Head | None:
        """Of the shard's file, None where it is not there."""
        return read_head(self.shard_file(name)) if exists(self.shard_file(name)) else None

    def write_shard(self, name: str, table: pa.Table, *, made_of: str, damaged: str) -> Head:
        """:param made_of: identity of the shard."""
        return self._write(self.shard_file(name), [table["key"]], [table], made_of, damaged)

    def write_part(self, name: str, plan: Plan, part: Part, table: pa.Table, *, damaged: str) -> None:
        self._write(self._part_file(name, plan, part), [table["key"]], [table], plan.identity, damaged)

    def plan(self, shard: Shard) -> Plan | None:
        """How the shard was cut; None where it was not, or has changed since."""
        try:
            saved = json.loads(read_bytes(join(self._parts(shard.name), "plan.json")))
        except FileNotFoundError:
            return None
        plan = Plan(saved["identity"], [Part(**part) for part in saved["parts"]], saved["damaged"])
        return plan if plan.identity == shard.identity else None

    def plans(self, shards: list[Shard]) -> dict[str, Plan]:
        """Of those that have one."""
        with ThreadPoolExecutor(REQUESTS) as pool:
            return {shard.name: plan for shard, plan in zip(shards, pool.map(self.plan, shards), strict=True) if plan is not None}

    def save_plan(self, shard: Shard, plan: Plan) -> Plan:
        """The plan that stands: another process may have been first. Parts of a shard that has changed are removed."""
        path = join(self._parts(shard.name), "plan.json")
        if exists(path) and self.plan(shard) is None:
            remove_folder(self._parts(shard.name))
        if write_new_json(path, asdict(plan)):
            return plan
        return self.plan(shard) or plan

    def finished_parts(self) -> set[str]:
        """Files of all parts that are there (one listing)."""
        try:
            root, files = find_files(join(self.folder, "_parts"), (".parquet",))
        except UserError:
            return set()
        return {join(root, file.path) for file in files}

    def missing_parts(self, name: str, plan: Plan, there: set[str]) -> list[Part]:
        """:param there: :meth:`finished_parts`."""
        return [part for part in plan.parts if self._part_file(name, plan, part) not in there]

    def merge(self, name: str, plan: Plan) -> Head | None:
        """All parts -> the shard's file; None where one is missing, or another process has merged them just now."""
        there = {join(self._parts(name), file) for file in list_names(self._parts(name))}
        if self.missing_parts(name, plan, there):
            return None
        paths = [self._part_file(name, plan, part) for part in plan.parts]
        try:
            keys = [read_parquet(path, ["key"])["key"] for path in paths]
            tables = (read_parquet(path) for path in paths)  # memory holds one
            damages = dict.fromkeys([head.damaged for head in read_heads(paths)] + [plan.damaged])
            head = self._write(self.shard_file(name), keys, tables, plan.identity, "; ".join(filter(None, damages)))
        except FileNotFoundError:
            if exists(self.shard_file(name)):
                return None
            raise
        remove_folder(self._parts(name))
        return head

    def _write(self, path: str, keys: list[pa.ChunkedArray], tables: Iterable[pa.Table], made_of: str, damaged: str) -> Head:
        """Tables one after the other into one file; later samples with a key that was there get the error ``duplicate_key``."""
        counts = Counts()
        with writing(path, tmp_folder=join(self.folder, "_tmp")) as file, pq.ParquetWriter(file, SCHEMA) as out:
            for table, repeated in zip(tables, _repeated(keys), strict=True):
                marked = _mark_duplicates(table, repeated)
                counts += Counts.of(marked)
                out.write_table(marked, row_group_size=ROW_GROUP)
            head = Head(self.fingerprint, made_of, damaged, counts)
            out.add_key_value_metadata(head.metadata())
        return head


def _repeated(keys: list[pa.ChunkedArray]) -> list[np.ndarray]:
    """For each of the arrays, bool: the key stood before, in it or in an earlier one."""
    hashes = [np.array([hash(key) for key in array.to_pylist()], dtype=np.int64) for array in keys]
    everything = np.concatenate([*hashes, np.zeros(0, np.int64)])
    first = np.zeros(len(everything), dtype=bool)
    first[np.unique(everything, return_index=True)[1]] = True
    return np.split(~first, np.cumsum([len(h) for h in hashes]))[: len(hashes)]


def _mark_duplicates(table: pa.Table, repeated: np.ndarray) -> pa.Table:
    if not repeated.any():
        return table
    error = pc.if_else(pa.array(repeated), DUPLICATE_KEY, table["error"])
    return table.set_column(table.schema.get_field_index("error"), SCHEMA.field("error"), error)


# ---- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Annotations:
    """A finished annotations folder."""

    path: str
    roots: dict[str, str]
    """Source -> root of the corpus at the time of the look."""
    corpus: CorpusConfig
    """The words that named it."""
    ocr: dict[str, Any]
    fingerprint: str
    names: list[str]
    """Percent-encoded names of the shards, sorted."""

    def file(self, name: str) -> str:
        return join(self.path, "shards", f"{name}.parquet")

    def read(self, name: str, columns: list[str]) -> pa.Table:
        """Rows of a shard. :raises UserError: where the file is of other settings than the folder."""
        table = read_parquet(self.file(name), columns)
        if head_of(table).fingerprint != self.fingerprint:
            raise UserError(
                f"{mask(self.file(name))}: made with other settings than its folder; delete it and run raysys annotate again"
            )
        return table


def read_parquet(path: str, columns: list[str] | None = None) -> pa.Table:
    """Rows, with the metadata of the file."""
    with reading(path) as opened:
        file = pq.ParquetFile(opened)
        return file.read(columns).replace_schema_metadata(file.metadata.metadata)


def open_annotations(path: str) -> Annotations:
    """:raises UserError: where the folder is missing, foreign or unfinished."""
    path = absolute(path)
    require_finished(path, "annotate")
    head = resolved(read_json(join(path, "settings.json")))
    names = sorted(f.removesuffix(".parquet") for f in list_names(join(path, "shards")) if f.endswith(".parquet"))
    settings = head["settings"]
    sources = {name: SourceConfig(**source) for name, source in settings["corpus"].get("sources", {}).items()}
    corpus = CorpusConfig(settings["corpus"].get("path"), sources)
    return Annotations(path, settings["corpus"]["roots"], corpus, settings["ocr"], head["fingerprint"], names)


def refuse_changed_shard(path: str, made_of: str, now: str | None = None) -> None:
    """:param made_of: identity of the shard that was looked at; ``now``: as a listing has it, None asks the storage.

    :raises UserError: where the shard is not the one that was looked at: its offsets would read garbage.
    """
    try:
        now = now or identity(path)
    except FileNotFoundError as error:
        raise UserError(f"{mask(path)}: no such shard; bring it back, or annotate again") from error
    if made_of != now:
        raise UserError(f"{mask(path)}: changed since it was annotated (size:time {made_of} then, {now} now); annotate it again")


def annotated_shards(corpus: Corpus, annotations: Annotations) -> dict[str, Shard]:
    """Name -> shard for every annotated one. :raises UserError: where one is not in the corpus."""
    by_name = {shard.name: shard for shard in corpus.shards}
    missing = [name for name in annotations.names if name not in by_name]
    if missing:
        raise UserError(
            f"{len(missing)} annotated shards are not in the corpus, {missing[0]} first (annotated at "
            f"{mask(shard_path(annotations.roots, missing[0]))}); bring them back"
        )
    return {name: by_name[name] for name in annotations.names}
