"""``raysys filter shards=DIR``: the kept samples as WebDataset tars, original bytes untouched.

    DIR/settings.json     of which selection
    DIR/a/00000.tar       the kept samples of the shard a/00000.tar (.parquet and captions files become .tar), whole or not at all
    DIR/sizes.json        {"a/00000.tar": samples}, and one in each folder below for what lies there: open_clip reads it
    DIR/manifest.json     counts; written last

Of a tar only the headers are read; the kept samples' headers and data are copied byte for byte. Pictures of Parquet files and folders
become ``KEY.jpg`` (or what they are) + ``KEY.txt``, and ``KEY.json`` where there is more to say. Memory holds some MB, however large a shard is.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import BinaryIO
from urllib.parse import unquote

import numpy as np

from raysys.console import Progress
from raysys.corpus.prefetch import prefetch
from raysys.corpus.samples import DamagedShard, Sample
from raysys.corpus.shards import iter_samples, shard_path
from raysys.corpus.tars import iter_spans
from raysys.errors import UserError
from raysys.masking import mask
from raysys.output import Output, open_output
from raysys.patience import is_final
from raysys.regions.annotations import Annotations, read_head, refuse_changed_shard
from raysys.storage import find_files, named_errors, open_fs, remove_folder, write_json, writing

SHARDS_AT_ONCE = 8
"""Shards that are copied beside each other: each waits for storage most of the time."""
COPY_BYTES = 1 << 20
"""Read and written at once."""
READ_AT_ONCE_BYTES = 8 << 20
"""Neighbouring samples of a tar are copied as one up to here, so that the headers' reader does not run far ahead."""
_MAGIC = {b"\xff\xd8\xff": "jpg", b"\x89PNG": "png", b"GIF8": "gif", b"BM": "bmp", b"II*\0": "tif", b"MM\0*": "tif"}


@dataclass
class Written:
    shards: int
    samples: int


def write_shards(
    folder: str, annotations: Annotations, keep_of: Callable[[str], np.ndarray], roots: dict[str, str], made_of: dict[str, str]
) -> Written:
    """Write a tar for every shard that has kept samples; one that is there is done.

    :param keep_of: name of a shard -> bool [its samples].
    :param roots: where the sources of the corpus lie now.
    :param made_of: what the selection is known by; a folder of another one is refused.
    :returns: what lies in the folder, written now or before.
    """
    output = open_output(folder, "shards", made_of)
    targets = _targets(annotations.names)
    done = _tars_in(output.path)

    def copy(name: str) -> int:
        keep = keep_of(name)
        if keep.any() and targets[name] not in done:
            _write_tar(output, targets[name], shard_path(roots, name), keep, read_head(annotations.file(name)).identity)
        return int(np.count_nonzero(keep))

    sizes: dict[str, int] = {}
    try:
        with Progress("filter", len(targets), "shards copied") as progress:
            for name, samples in zip(targets, prefetch(targets, copy, threads=SHARDS_AT_ONCE, ahead=SHARDS_AT_ONCE), strict=True):
                if samples:
                    sizes[targets[name]] = samples
                progress.advance(items=samples)
    except OSError as error:
        if is_final(error):
            raise
        raise UserError(f"shards={mask(folder)}: {error}; mend it and run the same words again, what is done stays done") from error
    _write_sizes(output, sizes)
    remove_folder(output.join("_tmp"))
    written = Written(len(sizes), sum(sizes.values()))
    if not output.finished or not done.issuperset(sizes):
        output.finish({"shards": written.shards, "samples": written.samples, "shards_without_kept": len(targets) - written.shards})
    return written


def _targets(names: list[str]) -> dict[str, str]:
    """Name of a shard -> path of its tar; two that differ in their suffix only (captions.csv, captions.jsonl) keep it."""
    stems = {name: os.path.splitext(unquote(name))[0] for name in names}
    shared = Counter(stems.values())
    return {name: f"{stem if shared[stem] == 1 else unquote(name)}.tar" for name, stem in stems.items()}


def _tars_in(folder: str) -> set[str]:
    try:
        return {file.path for file in find_files(folder, (".tar",))[1]}
    except UserError:
        return set()  # nothing is there yet


def _write_sizes(output: Output, sizes: dict[str, int]) -> None:
    """A sizes.json in every folder: open_clip looks for a tar's bare name beside the first tar."""
    by_folder: dict[PurePosixPath, dict[str, int]] = {PurePosixPath("."): {}}
    for path, samples in sizes.items():
        for folder in PurePosixPath(path).parents:
            by_folder.setdefault(folder, {})[str(PurePosixPath(path).relative_to(folder))] = samples
    for folder, below in by_folder.items():
        write_json(output.join(*folder.parts, "sizes.json"), below)


# ---- one shard --------------------------------------------------------------------------------------------------------


def _write_tar(output: Output, target: str, source: str, keep: np.ndarray, made_of: str) -> None:
    """:param made_of: identity of the shard that was annotated. :raises UserError: where it is another now, before or after."""
    refuse_changed_shard(source, made_of)
    with writing(output.join(target), tmp_folder=output.join("_tmp")) as out:
        copied = (_copy_spans if source.endswith(".tar") else _pack)(source, keep, out)
        if copied != np.count_nonzero(keep):
            raise UserError(
                f"{mask(source)}: {copied} of its {np.count_nonzero(keep)} kept samples could be read; annotate it again"
            )
        refuse_changed_shard(source, made_of)


def _copy_spans(source: str, keep: np.ndarray, out: BinaryIO) -> int:
    """The kept samples of a tar as a tar: headers and data as they stand there. :returns: how many."""
    fs, inner = open_fs(source)
    copied, last = 0, -1  # index of the sample before: one may have several spans
    start = end = size = 0  # what is to be copied, and what was
    with named_errors(source), fs.open(inner, "rb", block_size=READ_AT_ONCE_BYTES) as file:
        with suppress(DamagedShard):  # the good part was annotated
            for index, first, after in iter_spans(source):
                if index >= len(keep) or not keep[index]:
                    continue
                copied += index != last
                last = index
                if first != end or end - start >= READ_AT_ONCE_BYTES:
                    size += _copy(file, start, end, out)
                    start = first
                end = after
        size += _copy(file, start, end, out)
    size += out.write(bytes(2 * tarfile.BLOCKSIZE))  # the end of an archive
    out.write(bytes(-size % tarfile.RECORDSIZE))
    return copied


def _copy(file: BinaryIO, start: int, end: int, out: BinaryIO) -> int:
    """Copy a span; a shard that breaks off may lack the zeros that fill the last block. :returns: bytes written."""
    file.seek(start)
    left = end - start
    while left and (data := file.read(min(left, COPY_BYTES))):
        out.write(data)
        left -= len(data)
    if left >= tarfile.BLOCKSIZE:
        raise OSError(f"the source ends {left} bytes before byte {end}")
    out.write(bytes(left))
    return end - start


def _pack(source: str, keep: np.ndarray, out: BinaryIO) -> int:
    """The kept samples of a Parquet file or a folder of pictures as a tar. :returns: how many."""
    copied = 0
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar, suppress(DamagedShard):
        for sample in iter_samples(source):
            if sample.index >= len(keep) or not keep[sample.index]:
                continue
            for suffix, data in _members(source, sample):
                member = tarfile.TarInfo(f"{_member_key(sample)}.{suffix}")  # mtime, uid and gid 0: the same bytes every time
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every header it wrote
            copied += 1
    return copied


def _members(source: str, sample: Sample) -> Iterator[tuple[str, bytes]]:
    """Suffixes and contents."""
    if sample.image is None:
        raise UserError(
            f"{mask(source)}: the picture of {sample.key} is gone since it was annotated; bring it back, or annotate again"
        )
    yield _image_suffix(sample.image), sample.image
    yield "txt", sample.captions[0].encode()
    if len(sample.captions) > 1 or sample.uid:
        info = {"captions": sample.captions} | ({"uid": sample.uid} if sample.uid else {})
        yield "json", json.dumps(info, ensure_ascii=False).encode()


def _image_suffix(data: bytes) -> str:
    """By its first bytes; jpg for what has no suffix that a WebDataset reader knows (readers go by the content)."""
    if data[8:12] == b"WEBP":
        return "webp"
    if data[4:12] in (b"ftypavif", b"ftypavis"):
        return "avif"
    return next((suffix for magic, suffix in _MAGIC.items() if data.startswith(magic)), "jpg")


def _member_key(sample: Sample) -> str:
    """The key less what would make webdataset read another one: it ends a key at the first dot, and skips ``__names__``."""
    folder, slash, name = sample.key.rpartition("/")
    name = name.replace(".", "%2E")
    if not name or (name.startswith("__") and name.endswith("__")):
        name = f"{sample.index:09d}"
    return folder + slash + name
