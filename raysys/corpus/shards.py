"""A corpus as the user names it -> its shards; a shard, whatever its format -> samples.

In: ``corpus.path`` or ``corpus.sources``. Out: :class:`Corpus`, and for each :class:`Shard` its samples, its parts (ranges of a large
shard) and its pictures. The formats stand in :mod:`tars`, :mod:`parquet` and :mod:`folder`; nothing else knows them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from glob import has_magic
from types import ModuleType
from urllib.parse import unquote

from raysys.config import CorpusConfig
from raysys.corpus import folder, parquet, tars
from raysys.corpus.samples import Part, Plan, Sample
from raysys.errors import UserError
from raysys.masking import mask
from raysys.storage import FileInfo, absolute, find_files, identity, join, shard_name

CAPTION_FILES = ("captions.csv", "captions.jsonl")
MAX_NAME_BYTES = 200
"""Of a shard's name in file names; file systems end at 255, and raysys appends to it."""


@dataclass(frozen=True)
class Shard:
    """A file of a corpus: a tar, a Parquet file, or the captions file of a folder of pictures."""

    name: str
    """Its path below the corpus root, with ``SOURCE/`` before it where there are several sources; percent-encoded."""
    path: str
    size: int
    """Bytes of the file."""
    identity: str
    """Size and etag or modification time, as the listing gave them."""
    modified: float = 0.0
    """Seconds since 1970."""

    @property
    def picture_bytes(self) -> int:
        """Estimate of what its pictures weigh: of a captions file 500 times its own size (100 bytes a line, 50 KB a picture)."""
        return self.size * (500 if self.path.endswith((".csv", ".jsonl")) else 1)


@dataclass
class Corpus:
    roots: dict[str, str]
    """Source -> the folder that its shards share; one source without a name is ``""``. Names are relative, so a mount may move."""
    shards: list[Shard]
    """Sorted by name."""


def open_corpus(corpus: CorpusConfig) -> Corpus:
    """List the shards. :raises UserError: where there are none, their format is not clear, or raysys cannot read it."""
    sources = {"": corpus.path} if corpus.path is not None else {name: source.path for name, source in corpus.sources.items()}
    roots: dict[str, str] = {}
    shards: list[Shard] = []
    for source, path in sources.items():
        roots[source], files = _shard_files(path)
        for file in files:
            name = shard_name(join(source, file.path) if source else file.path)
            if len(name) > MAX_NAME_BYTES:
                raise UserError(f"{mask(path)}: the name of shard {file.path} is too long (percent-encoded {len(name)} bytes, at most "
                                f"{MAX_NAME_BYTES}); point corpus.path at a deeper folder, or rename it")  # fmt: skip
            shards.append(Shard(name, join(roots[source], file.path), file.size, file.identity, file.modified))
    return Corpus(roots, sorted(shards, key=lambda shard: shard.name))


def absolute_corpus(corpus: CorpusConfig) -> CorpusConfig:
    """The same corpus for a process that runs in another folder."""
    sources = {name: replace(source, path=absolute(source.path)) for name, source in corpus.sources.items()}
    return CorpusConfig(absolute(corpus.path) if corpus.path is not None else None, sources)


def refuse_output_in_corpus(word: str, output: str, corpus: CorpusConfig) -> None:
    """:raises UserError: where what is written would be taken for shards by the next call: a folder in a folder of the corpus."""
    for path in (corpus.path, *(source.path for source in corpus.sources.values())):
        if path is None or has_magic(path) or "{" in path:
            continue
        if f"{absolute(output)}/".startswith(f"{absolute(path).rstrip('/')}/"):
            raise UserError(
                f"{word}={mask(output)} lies in the corpus {mask(path)}, and its files would be taken for shards; "
                f"give a folder elsewhere, or name the shards with a glob ({mask(path).rstrip('/')}/*.tar)"
            )


def first_shards(roots: dict[str, str], names: Iterable[str]) -> dict[str, str]:
    """Key of the words -> path of a shard of that source: who sees it sees the source.

    :param names: of all shards.
    """
    first: dict[str, str] = {}
    for name in names:
        source = "" if "" in roots else unquote(name).split("/")[0]
        key = f"corpus.sources.{source}.path" if source else "corpus.path"
        if key not in first:
            first[key] = shard_path(roots, name)
            if len(first) == len(roots):
                break
    return first


def shard_path(roots: dict[str, str], name: str) -> str:
    """Where the shard of that name lies."""
    relative = unquote(name)
    if "" in roots:
        return join(roots[""], relative)
    source, _, rest = relative.partition("/")
    if source not in roots:
        raise ValueError(f"no root of shard {name} is known")
    return join(roots[source], rest)


def _shard_files(path: str) -> tuple[str, list[FileInfo]]:
    """The root of a source and its shards: tars, else Parquet files, else captions files of folders with pictures."""
    root, files = find_files(path, (".tar", ".parquet", *CAPTION_FILES))
    kinds: dict[str, list[FileInfo]] = {".tar": [], ".parquet": [], "captions": []}
    for file in files:
        suffix = os.path.splitext(file.path)[1]
        captions = os.path.basename(file.path) in CAPTION_FILES
        kind = "captions" if captions or suffix in (".csv", ".jsonl") else suffix
        if kind not in kinds:
            raise UserError(f"{mask(path)}: {file.path} is not an uncompressed .tar, a .parquet or a captions file (.csv, .jsonl); "
                            "raysys reads pictures by their place in it: decompress it, or name the shards with a glob")  # fmt: skip
        kinds[kind].append(file)
    stems = {os.path.splitext(file.path)[0] for file in kinds[".tar"]}
    if all(os.path.splitext(file.path)[0] in stems for file in kinds[".parquet"]):
        kinds[".parquet"] = []  # img2dataset writes the metadata of 00000.tar beside it as 00000.parquet
    several = {kind: found for kind, found in kinds.items() if found}
    if len(several) > 1:
        counts = " and ".join(f"{len(found)} {kind} files" for kind, found in several.items())
        raise UserError(f"{mask(path)}: holds {counts}; say which are the corpus with a glob (corpus.path='{mask(path)}/*.tar')")
    return root, next(iter(several.values()))


def _format(path: str) -> ModuleType:
    return {".tar": tars, ".parquet": parquet}.get(os.path.splitext(path)[1], folder)


def iter_samples(path: str, part: Part | None = None) -> Iterator[Sample]:
    """Samples of a shard, or of a part of it, in order; memory holds few samples at a time.

    :raises DamagedShard: after the last good sample, where the shard breaks off.
    """
    samples: Iterator[Sample] = _format(path).iter_samples(path, part)
    return samples


def plan_parts(path: str, part_bytes: int) -> Plan:
    """Cut a shard into parts of about so many bytes: one pass over its headers, no picture is read."""
    before = identity(path)
    parts, damaged = _format(path).plan_parts(path, part_bytes)
    return Plan(before, parts, damaged)


def read_image(path: str, *, index: int, offset: int, size: int) -> bytes:
    """Bytes of one picture by its place in the shard, as the annotations have it."""
    data: bytes = _format(path).read_image(path, index=index, offset=offset, size=size)
    return data
