"""Files and folders, local or on any fsspec filesystem: listing, ranged reads, whole-or-nothing writes.

In: paths and URLs as users write them. Out: bytes and sorted lists of files; errors that pass are waited for (:mod:`raysys.patience`).
Leaves to others what stands in the files.
"""

from __future__ import annotations

import errno
import functools
import glob as _glob
import hashlib
import itertools
import json
import logging
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem

from raysys.errors import UserError
from raysys.masking import is_masked, mask
from raysys.patience import Patient, is_final, naming_full_disk

P = ParamSpec("P")
T = TypeVar("T")
READ_AHEAD_BYTES = 8 << 20
"""Read at once from an object store: at 80 MB/s it takes 0.1 s, three times what a request waits, and a part is read past its end by no more."""
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_LIBRARIES = ("botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google")
"""Behind the filesystems of object stores; their errors are no OSErrors, or have no file name."""


def open_fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Filesystem of a path or URL, and the path within it (absolute for local ones).

    Listings are never cached: other processes write into the same folders. A remote filesystem goes on through errors that pass
    (:class:`Patient`).
    """
    if is_masked(path):
        raise UserError(
            f"{path}: its credentials were not stored; say where it lies with the key for it (corpus.path=... for a corpus), "
            "in a config=FILE best as ${oc.env:NAME}"
        )
    protocol, _, rest = path.partition("://")
    bucket = rest.split("/")[0]
    if protocol in _S3 + _GCS:
        if not bucket:
            raise UserError(f"{path}: names no bucket; write {protocol}://BUCKET/PATH")
        if re.search("[:@]", bucket) and not bucket.startswith("arn:"):
            where = (
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
                if protocol in _S3
                else "GOOGLE_APPLICATION_CREDENTIALS"
            )
            raise UserError(f"{mask(path)}: {protocol}:// takes no credentials in the URL; set {where}")
    how: dict[str, Any] = {} if is_local(path) else {"use_listings_cache": False}
    if protocol in _S3:
        how["config_kwargs"] = {"retries": {"mode": "standard"}}
    try:
        fs, inner = fsspec.core.url_to_fs(path, **how)
    except ImportError as error:
        extra = "s3" if protocol in _S3 else "gs" if protocol in _GCS else ""
        mend = f"pip install 'raysys[{extra}]'" if extra else str(error)
        raise UserError(f"{mask(path)}: {protocol}:// needs a package that is not installed: {mend}") from error
    except ValueError as error:
        raise UserError(f"{mask(path)}: {error}; give a local path, s3:// or gs://") from error
    if isinstance(fs, LocalFileSystem):
        return fs, os.path.abspath(inner)
    if protocol in _S3:
        fs.retries = 1  # botocore's and ours are enough: s3fs would multiply them
    elif protocol in _GCS:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a traceback for every error that it raises anyway
    return cast(fsspec.AbstractFileSystem, Patient(fs, mask(path))), inner


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def absolute(path: str) -> str:
    """The path as any process on this machine sees it; URLs stay as they are."""
    return os.path.abspath(path) if is_local(path) else path


def join(folder: str, *parts: str) -> str:
    return "/".join([folder.rstrip("/"), *parts])


# ---- errors of object stores as those of files ------------------------------------------------------------------------


@contextmanager
def named_errors(path: str) -> Iterator[None]:
    """What the library of a filesystem raises within -> the builtin error that a local file would raise, with the path."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        named = None if is_local(path) else _named(error, mask(path))
        if named is None:
            raise
        raise named from error


def _named(error: Exception, path: str) -> Exception | None:
    text, name = mask(" ".join(str(error).split())), type(error).__name__
    if isinstance(error, OSError) and name == "FileExpired":  # s3fs reads with If-Match
        return FileNotFoundError(errno.ENOENT, "changed while it was read", path)
    if is_final(error):
        return None
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        kind = type(error)
        number = error.errno or {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}.get(kind, errno.EIO)
        return None if error.filename else kind(number, error.strerror or text, path)
    if type(error).__module__.split(".")[0] not in _LIBRARIES:
        return None
    if name == "ParamValidationError":  # no such name of a bucket can be
        return UserError(f"{path}: {text}; mend the name of the bucket")
    if "Credentials" in name:
        return PermissionError(errno.EACCES, text, path)
    return ConnectionError(errno.ECONNABORTED, text, path)


def names_errors(work: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
    """For functions of a path: :func:`named_errors` around them."""

    @functools.wraps(work)
    def named(path: str, *args: P.args, **kwargs: P.kwargs) -> T:
        with named_errors(path):
            return work(path, *args, **kwargs)

    return named


# ---- files ------------------------------------------------------------------------------------------------------------


@contextmanager
def reading(path: str, *, ahead_bytes: int = READ_AHEAD_BYTES) -> Iterator[BinaryIO]:
    """A file to read from, front to back in requests of ``ahead_bytes``; with 0 each read is one request of just its bytes.

    :raises FileNotFoundError: from a read, where an object changed since it was opened.
    """
    fs, inner = open_fs(path)
    how = {"block_size": ahead_bytes, "cache_type": "readahead"} if ahead_bytes else {"cache_type": "none"}
    with named_errors(path), fs.open(inner, "rb", **({} if isinstance(fs, LocalFileSystem) else how)) as file:
        yield file


@names_errors
def exists(path: str) -> bool:
    fs, inner = open_fs(path)
    return fs.exists(inner)


@names_errors
def read_bytes(path: str) -> bytes:
    fs, inner = open_fs(path)
    return fs.cat_file(inner)


def read_json(path: str) -> Any:
    """:raises UserError: where the file is missing or is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"{mask(path)}: no such file; check the path") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{mask(path)}: not valid JSON ({error}); mend the file") from error


@contextmanager
def writing(path: str, *, tmp_folder: str | None = None, durable: bool = True) -> Iterator[BinaryIO]:
    """A file that is there whole when the block ends, and not at all where it raises: a local rename, or one upload.

    ``tmp_folder`` (same filesystem) takes the unfinished file where the target's folder must hold nothing else. A local file that is not
    ``durable`` outlives its process, but a machine only after :func:`flush`.
    """
    fs, inner = open_fs(path)
    local = isinstance(fs, LocalFileSystem)
    folder = tempfile.gettempdir() if not local else open_fs(tmp_folder)[1] if tmp_folder else os.path.dirname(inner)
    os.makedirs(folder, exist_ok=True)
    if local:
        os.makedirs(os.path.dirname(inner), exist_ok=True)
    unfinished = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    try:
        with naming_full_disk(inner if local else f"TMPDIR={folder}"), open(unfinished, "wb") as file:
            yield file
            file.flush()
            if local and durable:
                os.fsync(file.fileno())
        if local:
            os.replace(unfinished, inner)
        else:
            with named_errors(path):
                fs.put_file(unfinished, inner)  # visible when the upload is complete
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)


def flush(path: str) -> None:
    """A file that was not durable is on disk when this returns. After many writes that costs little: flushing each at once kept a core busy."""
    fs, inner = open_fs(path)
    if isinstance(fs, LocalFileSystem):
        file = os.open(inner, os.O_RDONLY)
        try:
            with naming_full_disk(inner):
                os.fsync(file)
        finally:
            os.close(file)


@names_errors
def write_bytes(path: str, data: bytes, *, tmp_folder: str | None = None, durable: bool = True) -> None:
    """Write a file whole or not at all. See :func:`writing`."""
    fs, inner = open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    with writing(path, tmp_folder=tmp_folder, durable=durable) as file:
        file.write(data)


@names_errors
def write_new(path: str, data: bytes) -> bool:
    """Write a file whole unless it is there; False where another process was first with other bytes.

    Where another was first with the same bytes, an object store's answer is True: a request may have been done though its answer was lost,
    and when it is sent again the store says the same as to another process. So bytes that say who is first must differ between processes.
    """
    fs, inner = open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        return _create_object(fs, inner, data)
    with naming_full_disk(inner):
        return _create_file(inner, data)


def _create_file(inner: str, data: bytes) -> bool:
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    unfinished = os.path.join(os.path.dirname(inner), f".tmp-{uuid.uuid4().hex}")
    try:
        Path(unfinished).write_bytes(data)
        os.link(unfinished, inner)  # fails where the name is taken, unlike a rename
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_links(inner, data)  # mounted object stores, FAT, SMB
    finally:
        with suppress(FileNotFoundError):
            os.unlink(unfinished)
    return True


def _create_without_links(inner: str, data: bytes) -> bool:
    """Exclusive, but not whole at once: who comes in between reads less."""
    try:
        file = open(inner, "xb")  # noqa: SIM115
    except FileExistsError:
        return False
    try:
        with file:
            file.write(data)
    except OSError:
        os.unlink(inner)
        raise
    return True


def _create_object(fs: fsspec.AbstractFileSystem, inner: str, data: bytes) -> bool:
    """S3: If-None-Match, GCS: ifGenerationMatch. See :func:`write_new`."""
    try:
        fs.pipe_file(inner, data, mode="create")
        return True
    except OSError as error:
        if not isinstance(error, FileExistsError) and "PreconditionFailed" not in f"{error!r} {error.__cause__!r}":
            raise
    with suppress(FileNotFoundError):
        return fs.cat_file(inner) == data
    return False


def write_new_json(path: str, value: Any) -> bool:
    return write_new(path, _json(value))


@names_errors
def list_names(folder: str) -> list[str]:
    """Names of what is in a folder (one listing); none where it is not there."""
    fs, inner = open_fs(folder)
    paths = [entry["name"].rstrip("/") for entry in _ls(fs, inner)]
    # S3's console marks a folder by an object of its name.
    return [path.rsplit("/", 1)[-1] for path in paths if path != inner.rstrip("/")]


@names_errors
def remove_file(path: str) -> None:
    """Remove a file; nothing happens where it is not there."""
    fs, inner = open_fs(path)
    with suppress(FileNotFoundError):
        fs.rm_file(inner)


@names_errors
@names_errors
def remove_folder(path: str) -> None:
    """Remove a folder and what is in it; nothing happens where it is not there."""
    fs, inner = open_fs(path)
    with suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@names_errors
def identity(path: str) -> str:
    """Size and etag or modification time: what changes when a file does."""
    fs, inner = open_fs(path)
    return identity_of(fs.info(inner))


def identity_of(info: dict[str, Any]) -> str:
    """The same from an entry of a listing."""
    stamp = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return f"{info['size']}:{str(stamp).strip(chr(34))}"


def expand_braces(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` and ``{x,y}.tar``, as webdataset and bash understand them."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    body = match.group(1)
    span = re.fullmatch(r"(\d+)\.\.(\d+)", body)
    if span:
        first, last = span.groups()
        width = len(first) if first.startswith("0") or len(first) == len(last) else 0
        choices = [str(i).zfill(width) for i in range(int(first), int(last) + 1)]
    elif "," in body:
        choices = body.split(",")
    else:
        raise UserError(f"{pattern}: a brace is {{first..last}} or {{a,b}}, not {{{body}}}")
    tails = expand_braces(pattern[match.end() :])
    return [pattern[: match.start()] + choice + tail for choice, tail in itertools.product(choices, tails)]


@dataclass(frozen=True)
class FileInfo:
    """A file as a listing shows it."""

    path: str
    """Relative to the root of the listing."""
    size: int
    identity: str
    """As :func:`identity` gives it."""
    modified: float
    """Seconds since 1970; 0 where the filesystem does not say."""


@names_errors
def find_files(path: str, suffixes: tuple[str, ...]) -> tuple[str, list[FileInfo]]:
    """Files with one of the suffixes in a folder, glob or brace list; one listing a folder.

    :returns: the root that they share (a folder) and the files, sorted by path.
    :raises UserError: where nothing is found, or a name of a brace list is not there.
    """
    found: dict[str, dict[str, Any]] = {}
    roots: list[str] = []
    listings: dict[str, dict[str, dict[str, Any]]] = {}
    patterns = expand_braces(path)
    for pattern in patterns:
        fs, inner = open_fs(pattern)
        if _glob.has_magic(inner):
            matches = _glob_files(fs, inner)
            files = {name: i for name, i in matches.items() if i["type"] == "file" or (i.get("islink") and fs.isfile(name))}
            roots += [os.path.dirname(name) for name in files]
        else:
            parent, inner = os.path.dirname(inner.rstrip("/")), inner.rstrip("/")
            if len(patterns) > 1:  # one listing of the folder, not one call a name
                if parent not in listings:
                    listings[parent] = {e["name"].rstrip("/"): e for e in _ls(fs, parent)}
                info = listings[parent].get(inner)
            else:
                info = _info(fs, inner)
            if info is None:
                raise UserError(f"{mask(pattern)}: no such file or folder; check the path")
            if info["type"] == "directory":
                files = {name: i for name, i in fs.find(inner, detail=True).items() if name.endswith(suffixes)}
                roots.append(inner)
            else:
                files = {inner: info}
                roots.append(parent)
        twice = found.keys() & files.keys()
        if twice:
            raise UserError(f"{mask(path)}: names {mask(min(twice))} twice; name it once")
        found |= files
    if not found:
        raise UserError(f"{mask(path)}: no {' or '.join(suffixes)} files there; check the path")
    root = os.path.commonpath(roots)
    if not root:
        raise UserError(f"{mask(path)}: names several buckets; make each a source (corpus.sources.NAME.path=...)")
    protocol = "" if is_local(path) else path.split("://")[0] + "://"
    infos = [FileInfo(f[len(root) :].removeprefix("/"), i["size"], identity_of(i), _modified(i)) for f, i in sorted(found.items())]
    return protocol + root, infos


def _glob_files(fs: Any, pattern: str) -> dict[str, dict[str, Any]]:
    """What matches, by listings of our own where the filesystem is remote: fsspec's glob leaves out, in silence, a folder that it cannot list."""
    if isinstance(fs, LocalFileSystem):
        return fs.glob(pattern, detail=True)
    folder = os.path.dirname(pattern)
    if _glob.has_magic(folder):
        found = fs.find(os.path.dirname(re.split(r"[*?\[]", pattern)[0]), detail=True)
    else:
        found = {entry["name"]: entry for entry in _ls(fs, folder)}
    matches = re.compile(fsspec.utils.glob_translate(pattern))
    return {name: info for name, info in found.items() if matches.match(name)}


def _ls(fs: fsspec.AbstractFileSystem, folder: str) -> list[dict[str, Any]]:
    try:
        return fs.ls(folder, detail=True)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _info(fs: fsspec.AbstractFileSystem, path: str) -> dict[str, Any] | None:
    try:
        return fs.info(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def _modified(info: dict[str, Any]) -> float:
    stamp = info.get("mtime") or info.get("LastModified") or info.get("updated") or 0.0
    if isinstance(stamp, str):
        stamp = datetime.fromisoformat(stamp)
    return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)


def list_files(path: str, suffix: str) -> tuple[str, list[str]]:
    """As :func:`find_files`, paths only."""
    root, files = find_files(path, (suffix,))
    return root, [file.path for file in files]


def shard_name(relative: str) -> str:
    """A shard's name in file names and columns: its path below the corpus root, percent-encoded.

    So is a dot or an underscore at its beginning: pandas, Arrow and Spark pass over files of a folder that begin with one.
    """
    hidden = relative[:1] in (".", "_")
    return f"%{ord(relative[0]):02X}{quote(relative[1:], safe='')}" if hidden else quote(relative, safe="")


def sha256_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()
