"""WebDataset tars, as img2dataset, open_clip and DataComp write them.

A sample is a run of neighbouring members that share a key (the name up to the first dot of its last part): ``KEY.jpg``, ``KEY.txt``,
``KEY.json``. Captions are ``captions`` of the JSON, else the .txt, else ``caption`` of the JSON.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from raysys.corpus.samples import BAD_RECORD, UNSAFE_NAME, DamagedShard, Part, Sample, as_uid, clean_captions, is_unsafe, printable
from raysys.errors import UserError
from raysys.masking import mask
from raysys.storage import named_errors, names_errors, open_fs, reading

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif")
MAX_GAP_BYTES = 64 << 10
"""Between two pictures that are read at once: headers, captions and up to three dropped samples of a usual 20 KB. On an object store, where a
request waits 30 ms, more would be faster for one reader; but readers are many and share what the network carries."""
MAX_TEXT_BYTES = 16 << 20
"""Of a .txt or .json member; as in captions files. A longer one would only fill the memory."""
_TEXTS = ("txt", "json")


@dataclass
class SampleGroup:
    """Members of one sample."""

    key: str
    start: int
    end: int = 0
    unsafe: bool = False
    members: dict[str, tuple[bytes, int, int]] = field(default_factory=dict)
    """Suffix -> bytes (empty where they are not wanted), offset, size."""

    @property
    def image_suffix(self) -> str | None:
        return next((s for s in IMAGE_SUFFIXES if s in self.members), None)

    @property
    def is_whole(self) -> bool:
        """For the last sample of a shard that breaks off: nothing of it seems to be missing."""
        return self.image_suffix is not None and not self.members.keys().isdisjoint(("txt", "json"))


def iter_samples(path: str, part: Part | None) -> Iterator[Sample]:
    with reading(path) as file:
        file.seek(part.start if part else 0)
        index = part.first if part else 0
        for group in sample_groups(file, end=part.end if part else None, read=True):
            yield _sample(index, group)
            index += 1


def plan_parts(path: str, part_bytes: int) -> tuple[list[Part], str]:
    parts: list[Part] = []
    damaged = ""
    with reading(path) as file:
        first = count = start = end = 0
        try:
            for group in sample_groups(file, end=None, read=False):
                start = start if count else group.start
                count, end = count + 1, group.end
                if end - start >= part_bytes:
                    parts.append(Part(first, count, start, end))
                    first, count = first + count, 0
        except DamagedShard as error:
            damaged = str(error)
    return parts + ([Part(first, count, start, end)] if count else []), damaged


@names_errors
def read_image(path: str, *, index: int, offset: int, size: int) -> bytes:
    fs, inner = open_fs(path)
    data: bytes = fs.cat_file(inner, start=offset, end=offset + size)
    return data


def read_images(path: str, offset: np.ndarray, size: np.ndarray) -> tuple[list[memoryview], int]:
    """Pictures by their places, int64 [n] each; neighbours come in one ranged read.

    :returns: their bytes, and how many bytes were read.
    """
    order = np.argsort(offset, kind="stable")
    end = np.maximum.accumulate(offset[order] + size[order])
    cuts = np.flatnonzero(offset[order][1:] - end[:-1] > MAX_GAP_BYTES) + 1
    pictures: list[memoryview] = [memoryview(b"")] * len(order)
    bytes_read = 0
    fs, inner = open_fs(path)
    for run in np.split(order, cuts):
        first, last = int(offset[run[0]]), int((offset[run] + size[run]).max())
        with named_errors(path):
            data = memoryview(fs.cat_file(inner, start=first, end=last))
        if len(data) < last - first:
            raise UserError(
                f"{mask(path)}: ends at byte {first + len(data)}, a picture should be there: it changed since it was annotated; annotate it again"
            )
        bytes_read += len(data)
        for i in run.tolist():
            start = int(offset[i]) - first
            pictures[i] = data[start : start + int(size[i])]
    return pictures, bytes_read


def iter_spans(path: str) -> Iterator[tuple[int, int, int]]:
    """Index, first byte and end of every sample's own members: headers and data, filled up to whole blocks; no data is read.

    A sample has several spans where its members have long names, or other members stand between them.

    :raises DamagedShard: after the last sample that is there, as :func:`iter_samples` does.
    """
    fs, inner = open_fs(path)
    with named_errors(path), fs.open(inner, "rb", block_size=4 << 20) as file:  # of an object store, whose default holds 50 MB
        for index, group in enumerate(sample_groups(file, end=None, read=False)):
            bare = sum(tarfile.BLOCKSIZE * (1 + -(-length // tarfile.BLOCKSIZE)) for _, _, length in group.members.values())
            if group.end - group.start == bare:
                yield index, group.start, group.end
                continue
            file.seek(group.start)
            for tar, member in _members(file, group.end):
                if member.isfile() and _split_name(member.name)[0] == group.key:
                    yield index, member.offset, tar.offset


def sample_groups(file: BinaryIO, *, end: int | None, read: bool) -> Iterator[SampleGroup]:
    """Samples from where the file stands to the byte ``end``, or to the end of the archive. :raises DamagedShard: as tarfile finds it."""
    group: SampleGroup | None = None
    try:
        for tar, member in _members(file, end):
            key, suffix = _split_name(member.name)
            if not member.isfile() or not key:
                continue
            if group is None or key != group.key or suffix in group.members:
                if group is not None:
                    yield group
                group = SampleGroup(key, member.offset)
            data = b""
            if read and (suffix in IMAGE_SUFFIXES or (suffix in _TEXTS and member.size <= MAX_TEXT_BYTES)):
                content = tar.extractfile(member)
                assert content is not None  # a regular file has content
                data = content.read()
            group.members[suffix] = (data, member.offset_data, member.size)
            group.unsafe |= is_unsafe(member.name)
            group.end = tar.offset
    except (tarfile.TarError, EOFError) as error:
        if group is not None and group.is_whole:
            yield group
        raise DamagedShard(str(error) or "damaged") from error
    if group is not None:
        yield group


def _members(file: BinaryIO, end: int | None) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """Members whose data is all there. :raises tarfile.TarError: where the archive breaks off."""
    start = file.tell()
    size = file.seek(0, os.SEEK_END)
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it saw; a shard may hold millions
            if not 0 <= member.size <= size - member.offset_data:
                raise tarfile.ReadError(f"member {member.name} is cut off")
            yield tar, member
            if end is not None and tar.offset >= end:
                return
        if end is None:
            _refuse_early_end(file, tar.offset)


def _split_name(name: str) -> tuple[str, str]:
    """Key and suffix as webdataset has them; no key for what is no sample (hidden files, names without a dot, ``__meta__``)."""
    folder, name = os.path.split(name)
    stem, dot, suffix = name.partition(".")
    if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
        return "", ""
    key = f"{folder}/{stem}" if folder else stem
    return printable(key), suffix.lower()


def _refuse_early_end(file: BinaryIO, offset: int) -> None:
    """tarfile takes whatever is no header for the end. :raises tarfile.ReadError: unless the archive ends as it should."""
    file.seek(offset)
    block = file.read(tarfile.BLOCKSIZE)
    if not block:
        raise tarfile.ReadError("ends without an end-of-archive mark, cut off between two members")
    if block.strip(b"\0"):
        raise tarfile.ReadError(f"no tar header at byte {offset}")
    if file.read(tarfile.RECORDSIZE + tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"more members after the end-of-archive mark at byte {offset} (tars put one behind the other?)")


def _sample(index: int, group: SampleGroup) -> Sample:
    suffix = group.image_suffix
    data, offset, size = group.members[suffix] if suffix else (None, -1, -1)
    metadata = group.members.get("json", (b"", 0, 0))[0]
    info = metadata_of(metadata)
    captions, error = clean_captions(_captions(info, group))
    uid = as_uid(info.get("uid")) or as_uid(os.path.basename(group.key))
    if any(group.members[suffix][2] > MAX_TEXT_BYTES for suffix in _TEXTS if suffix in group.members):
        error = BAD_RECORD
    error = UNSAFE_NAME if group.unsafe else error
    return Sample(index, group.key, data, offset, size, captions, metadata, uid, error)


def metadata_of(data: bytes) -> dict[str, object]:
    """A .json member; nothing where it is none."""
    try:
        info = json.loads(data) if data else {}
    except (ValueError, RecursionError):
        return {}  # metadata of a crawler; the caption may still stand in the .txt
    return info if isinstance(info, dict) else {}


def _captions(info: dict[str, object], group: SampleGroup) -> list[str]:
    several = info.get("captions")
    if isinstance(several, list) and several and all(isinstance(c, str) for c in several):
        return several
    if "txt" in group.members:
        return [group.members["txt"][0].decode("utf-8", errors="surrogateescape")]
    return [info["caption"]] if isinstance(info.get("caption"), str) else []  # type: ignore[list-item]
