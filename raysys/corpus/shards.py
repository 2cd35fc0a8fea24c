"""WebDataset tars -> samples, with the place of every picture in its shard.

In: a path as the user wrote it. Out: :class:`Corpus` (which shards) and :func:`iter_samples` (what stands in one).
A sample is a run of neighbouring members that share a key: ``KEY.jpg|jpeg|png|webp|gif|bmp``, ``KEY.txt``, ``KEY.json``.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field

from raysys.storage import UserError, join, list_files, open_fs, shard_name

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")


class DamagedShard(ValueError):
    """The shard ends early or is no tar; what came before stays good."""


@dataclass
class Corpus:
    root: str
    """Folder that the shards share; names are relative to it, so a mount may move."""
    shards: list[str]
    """Sorted paths relative to the root."""

    def path(self, shard: str) -> str:
        return join(self.root, shard)


@dataclass
class Sample:
    index: int
    """Position within the shard."""
    key: str
    image: bytes | None = None
    offset: int = -1
    size: int = -1
    """Bytes of the image member within the shard; -1 where it is missing."""
    captions: list[str] = field(default_factory=list)
    metadata: bytes = b""
    """The .json member as it is; empty where there is none."""


def open_corpus(path: str) -> Corpus:
    """:raises UserError: where there is no shard, or a shard is compressed (its offsets would mean nothing)."""
    root, shards = list_files(path, ".tar")
    odd = next((s for s in shards if not s.endswith(".tar")), None)
    if odd:
        raise UserError(f"{path}: {odd} is not an uncompressed .tar; raysys reads pictures by their place in it")
    return Corpus(root, shards)


def same_corpus(path: str, root: str, names: list[str]) -> Corpus:
    """The corpus at ``path``, checked to hold the shards that annotations name (percent-encoded).

    :raises UserError: where one is missing.
    """
    corpus = open_corpus(path)
    there = {shard_name(s) for s in corpus.shards}
    missing = [n for n in names if n not in there]
    if missing:
        raise UserError(
            f"corpus.path={path}: {len(missing)} annotated shards are not there, {missing[0]} first (annotated at {root})"
        )
    return corpus


def iter_samples(path: str) -> Iterator[Sample]:
    """Samples of one tar in order; memory holds one sample at a time.

    :raises DamagedShard: after the last good sample, where the tar breaks off.
    """
    fs, inner = open_fs(path)
    with fs.open(inner, "rb") as file:
        index = 0
        key: str | None = None
        members: dict[str, tuple[bytes, int, int]] = {}
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    if not member.isfile():
                        continue
                    folder, name = os.path.split(member.name)
                    stem, _, suffix = name.partition(".")
                    here = f"{folder}/{stem}" if folder else stem
                    if key is not None and here != key:
                        yield _sample(index, key, members)
                        index += 1
                        members = {}
                    key = here
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file has content
                    data = content.read()
                    if len(data) < member.size:
                        raise tarfile.ReadError("a member is cut off")
                    members[suffix.lower()] = (data, member.offset_data, member.size)
                    tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it saw; a shard may hold millions
        except (tarfile.TarError, EOFError) as error:
            complete = key is not None and any(s in members for s in IMAGE_SUFFIXES)
            if key is not None and complete:
                yield _sample(index, key, members)
            raise DamagedShard(str(error)) from error
        if key is not None:
            yield _sample(index, key, members)


def _sample(index: int, key: str, members: dict[str, tuple[bytes, int, int]]) -> Sample:
    suffix = next((s for s in IMAGE_SUFFIXES if s in members), None)
    data, offset, size = members[suffix] if suffix else (None, -1, -1)
    return Sample(index, key, data, offset, size, _captions(members), members.get("json", (b"", 0, 0))[0])


def _captions(members: dict[str, tuple[bytes, int, int]]) -> list[str]:
    """``captions`` of the JSON, else the .txt, else ``caption`` of the JSON; none where all are missing."""
    info: object = {}
    if "json" in members:
        try:
            info = json.loads(members["json"][0])
        except ValueError:
            info = {}  # metadata of a crawler; the caption may still stand in the .txt
    info = info if isinstance(info, dict) else {}
    several = info.get("captions")
    if isinstance(several, list) and several and all(isinstance(c, str) for c in several):
        return several
    if "txt" in members:
        return [members["txt"][0].decode("utf-8", errors="replace").strip()]
    return [info["caption"]] if isinstance(info.get("caption"), str) else []
