"""Files and folders, local or on any fsspec filesystem: listing, ranged reads, whole-or-nothing writes, output folders.

An object store that answers errors for a while is asked again (:data:`RETRY_S`); a disk that is full, and a store that stays away, end
the work (:func:`is_final`) in one line (:func:`explained`). Local paths are never tried again: a network mount does that by itself.

In: paths and URLs as users write them. Out: bytes, sorted lists of files, and :class:`Output`, a folder that knows whose it is.
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
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO, Concatenate, ParamSpec, TypeVar, cast
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem

P = ParamSpec("P")
T = TypeVar("T")
READ_AHEAD_BYTES = 8 << 20
"""Read at once from an object store: at 80 MB/s it takes 0.1 s, three times what a request waits, and a part is read past its end by no more."""
RETRY_S = 120.0
"""An operation that an object store refuses for a while is tried again for so long. Each try is a few of the library's own (s3fs: botocore's
"standard" mode, 3 requests within some 2 s, AWS_MAX_ATTEMPTS; gcsfs: 6 within 35 s), the last may end later by that and by the time that
a dead network lets a request wait (s3fs: 15 s)."""
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 15.0
"""Between two tries: doubled from the first to the longest, each times a random 0.5 to 1."""
SAY_EVERY_S = 30.0
"""Fewest seconds between two lines of a process that storage is waited for."""
_NO_ROOM = {
    errno.ENOSPC: "no space left on the device of {}; make room",
    errno.EDQUOT: "the disk quota is used up at {}; make room",
    errno.EROFS: "{} is on a read-only filesystem; make it writable",
}
_S3, _GCS = ("s3", "s3a"), ("gs", "gcs")
_LIBRARIES = ("botocore", "aiobotocore", "s3fs", "aiohttp", "gcsfs", "google")
"""Behind the filesystems of object stores; their errors are no OSErrors, or have no file name."""


class UserError(ValueError):
    """A mistake in the words or the input: one line that names it and the mend; the command exits with status 2."""


class WorkFailed(RuntimeError):
    """The words were good, the work cannot end well: one line that says what happened and what may help; the command exits with status 1."""


class StorageDown(ConnectionError):
    """Remote storage gave nothing but errors that pass, for longer than :data:`RETRY_S`. Its file name is the URL, its strerror what was said."""


def is_final(error: BaseException) -> bool:
    """Whether it is in vain to start the same work again at once: no room, a read-only filesystem, :class:`StorageDown`.

    Of a Ray error that wraps one of these too.
    """
    cause = getattr(error, "cause", error)
    return isinstance(cause, StorageDown) or (isinstance(cause, OSError) and cause.errno in _NO_ROOM)


def explained(error: OSError) -> WorkFailed:
    """One line for the user, of an error that :func:`is_final`."""
    cause = getattr(error, "cause", error)
    where = mask(str(cause.filename or "an output, or of TMPDIR"))
    if isinstance(cause, StorageDown):
        return WorkFailed(f"{where}: {cause.strerror}; run the same words again later: what is done stays")
    return WorkFailed(f"{_NO_ROOM[cause.errno or errno.ENOSPC].format(where)} and run the same words again: what is done stays")


def open_fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Filesystem of a path or URL, and the path within it (absolute for local ones).

    Listings are never cached: other processes write into the same folders. A remote filesystem goes on through errors that pass
    (:class:`_Patient`).
    """
    if _MASKED.search(path):
        raise UserError(
            f"{path}: its credentials were not stored; say where it lies with the key for it (corpus.path=... for a corpus), "
            "in a config=FILE best as ${oc.env:NAME}"
        )
    protocol, _, rest = path.partition("://")
    bucket = rest.split("/")[0]
    if protocol in _S3 + _GCS:
        if not bucket:
            raise UserError(f"{path}: names no bucket")
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
        raise UserError(f"{mask(path)}: {error}") from error
    if isinstance(fs, LocalFileSystem):
        return fs, os.path.abspath(inner)
    if protocol in _S3:
        fs.retries = 1  # botocore's and ours are enough: s3fs would multiply them
    elif protocol in _GCS:
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # a traceback for every error that it raises anyway
    return cast(fsspec.AbstractFileSystem, _Patient(fs, mask(path))), inner


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def absolute(path: str) -> str:
    """The path as any process on this machine sees it; URLs stay as they are."""
    return os.path.abspath(path) if is_local(path) else path


def join(folder: str, *parts: str) -> str:
    return "/".join([folder.rstrip("/"), *parts])


# ---- what people may see ------------------------------------------------------------------------------------------------

INTERPOLATED = "RAYSYS_INTERPOLATED"
"""Environment variable in which a process tells itself and its Ray workers what its words interpolate: ``KEY:NAME ...``, the first part of
a key and the variable that its value names as ``${oc.env:NAME}``. No values stand in it."""
_ENV = re.compile(r"\$\{oc\.env:\s*(\w+)\s*\}")
_USER_INFO = re.compile(
    r"(://)(?:(?<!abfs://)(?<!abfss://)(?<!wasb://)(?<!wasbs://)(?<!az://)(?<!hdfs://)(?<!webhdfs://)[^/\s]*@|[^/:\s]+:(?!\d+/)\S*@)"
)
"""``abfs://CONTAINER@ACCOUNT`` and ``hdfs://USER@HOST`` hold no secret."""
_QUERY = re.compile(
    r"([?&](?:[\w-]*(?:signature|token|secret|password|credential|accesskeyid|api[-_]?key)|sig|key)=)[^&\s'\"#]+", re.IGNORECASE
)
_MASKED = re.compile(r"://\*\*\*@|[?&][\w-]+=\*\*\*")
_BY_CHANCE = 6
"""A shorter value of a variable may stand in a text for other reasons."""


def mask(path: str) -> str:
    """Hide secrets in a path or a text: ``sftp://key:secret@host/...`` (the secret may hold slashes), ``?X-Amz-Signature=...``, and
    values of variables that the words name, which become ``${oc.env:NAME}`` again."""
    values = {name: value for _, name, value in _interpolated() if len(value) >= _BY_CHANCE}
    return _unresolved(_without_credentials(path), values)


def as_written(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings as they may stand in a file: every text masked, and under keys that the words interpolate ``${oc.env:NAME}`` in place of
    the variable's value, however short it is. :func:`resolved` reads them."""

    def change(key: str) -> Callable[[str], str]:
        values = {name: value for interpolated, name, value in _interpolated() if interpolated == key}
        return lambda text: mask(_unresolved(text, values))

    return {key: _map_texts(value, change(key)) for key, value in settings.items()}


def resolved(settings: Any) -> Any:
    """Settings that :func:`as_written` wrote, with the variables' values of now. :raises UserError: naming a variable that is not set."""

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(
                f"{match[0]} stands in the settings, and the environment variable {match[1]} is not set; set it as it was then"
            )
        return os.environ[match[1]]

    return _map_texts(settings, lambda text: _ENV.sub(value_of, text))


def remember_interpolated(written: dict[str, Any]) -> None:
    """Take down which variables the words of this process name. :param written: the config, not resolved."""
    text_of = {key: json.dumps(value) for key, value in written.items()}
    names = {name for text in text_of.values() for name in re.findall(r"\$\{oc\.env:\s*(\w+)", text)}
    keys = {key for key, text in text_of.items() if "${" in text}
    os.environ[INTERPOLATED] = " ".join(f"{key}:{name}" for key in sorted(keys) for name in sorted(names))


def _interpolated() -> list[tuple[str, str, str]]:
    """Key, variable and its value."""
    entries = (entry.split(":") for entry in os.environ.get(INTERPOLATED, "").split())
    return [(key, name, os.environ[name]) for key, name in entries if os.environ.get(name)]


def _unresolved(text: str, values: dict[str, str]) -> str:
    """One pass: what was put in is not looked at again. :param values: variable -> value."""
    names = {value: name for name, value in values.items()}
    longest_first = "|".join(re.escape(value) for value in sorted(names, key=len, reverse=True))
    return re.sub(longest_first, lambda match: f"${{oc.env:{names[match[0]]}}}", text) if names else text


def _without_credentials(text: str) -> str:
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def _map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


# ---- errors that pass --------------------------------------------------------------------------------------------------

_OPERATIONS = ("cat_file", "info", "exists", "isdir", "ls", "find", "glob", "pipe_file", "put_file", "put", "get", "rm", "rm_file")
_PASSING_STATUS = (408, 429, 500, 502, 503, 504)
_PASSING_CODES = re.compile(
    "SlowDown|ServiceUnavailable|InternalError|Throttl|RequestTimeout|ConditionalRequestConflict|OperationAborted"
)
"""https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html"""
_PASSING_CLASSES = {
    *("ConnectionError", "TimeoutError", "Timeout", "IncompleteRead", "ChunkedEncodingError"),  # of Python, urllib3, requests
    *("HTTPClientError", "ResponseParserError"),  # of botocore
    *("ClientConnectionError", "ClientPayloadError", "ChecksumError"),  # of aiohttp, gcsfs
}
"""By name: their packages may not be there."""
_last_said = -SAY_EVERY_S


class _Patient:
    """A remote filesystem whose operations, and requests of files opened for reading, are tried again through errors that pass.

    An opened file asks again for just the range that failed: what was read stays, and its etag still must be the same.
    """

    def __init__(self, below: fsspec.AbstractFileSystem, url: str) -> None:
        self.below, self._url = below, url

    def __getattr__(self, name: str) -> Any:
        if name == "below":  # of a copy that is not made yet
            raise AttributeError(name)
        found = getattr(self.below, name)
        return functools.partial(_insist, self._url, found) if name in _OPERATIONS else found

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        file = _insist(self._url, self.below.open, path, mode, **how)
        if mode == "rb" and getattr(file, "cache", None) is not None:
            file.cache.fetcher = functools.partial(_insist, self._url, file.cache.fetcher)
        return file


def _insist(url: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """:raises StorageDown: after :data:`RETRY_S` of errors that pass. Any other error comes at once."""
    global _last_said
    begun, wait_s = time.monotonic(), FIRST_WAIT_S
    while True:
        try:
            return call(*args, **kwargs)
        except Exception as error:
            if not _passes(error):
                raise
            now, pause_s = time.monotonic(), wait_s * random.uniform(0.5, 1)
            said = mask(" ".join(str(getattr(error, "strerror", None) or error).split())) or type(error).__name__
            if now + pause_s > begun + RETRY_S:
                raise StorageDown(errno.ECONNABORTED, f"{said} (tried for {now - begun:.0f} s)", url) from error
        if now - _last_said > SAY_EVERY_S:
            _last_said = now
            print(f"{url}: {said}; trying again for up to {RETRY_S:.0f} s", file=sys.stderr, flush=True)
        time.sleep(pause_s)
        wait_s = min(2 * wait_s, LONGEST_WAIT_S)


def _passes(error: BaseException) -> bool:
    """Whether the same request may succeed in a while."""
    # An upload in parts that was completed by a request whose answer was lost: it goes up once more.
    if isinstance(error, FileNotFoundError) and "NoSuchUpload" in repr(error.__cause__):
        return True
    if isinstance(error, (FileNotFoundError, FileExistsError, PermissionError)) or "CERTIFICATE_VERIFY_FAILED" in str(error):
        return False
    answer = getattr(error, "response", None)  # botocore's ClientError has one, gcsfs's HttpError a code
    status = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else getattr(error, "code", None)
    return (
        str(status) in map(str, _PASSING_STATUS)
        or _PASSING_CODES.search(repr(error)) is not None
        or not _PASSING_CLASSES.isdisjoint(kind.__name__ for kind in type(error).__mro__)
        or bool(getattr(error, "retryable", False))  # google.auth's
        or (error.__cause__ is not None and _passes(error.__cause__))
    )


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
        return UserError(f"{path}: {text}")
    if "Credentials" in name:
        return PermissionError(errno.EACCES, text, path)
    return ConnectionError(errno.ECONNABORTED, text, path)


def _names_errors(work: Callable[Concatenate[str, P], T]) -> Callable[Concatenate[str, P], T]:
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


@_names_errors
def exists(path: str) -> bool:
    fs, inner = open_fs(path)
    return fs.exists(inner)


@_names_errors
def read_bytes(path: str) -> bytes:
    fs, inner = open_fs(path)
    return fs.cat_file(inner)


def read_json(path: str) -> Any:
    """:raises UserError: where the file is missing or is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"{mask(path)}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{mask(path)}: not valid JSON ({error})") from error


@contextmanager
def naming_full_disk(path: str) -> Iterator[None]:
    """Where there is no room for what is written within -> OSError with the path: a write itself names no file, torch.save raises a RuntimeError."""
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _NO_ROOM):
            cause = cause.__cause__ or cause.__context__
        if cause is None or (cause.filename is not None and ".tmp-" not in cause.filename):
            raise
        raise OSError(cause.errno, cause.strerror, path) from error


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


@_names_errors
def write_bytes(path: str, data: bytes, *, tmp_folder: str | None = None, durable: bool = True) -> None:
    """Write a file whole or not at all. See :func:`writing`."""
    fs, inner = open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    with writing(path, tmp_folder=tmp_folder, durable=durable) as file:
        file.write(data)


@_names_errors
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


@_names_errors
def list_names(folder: str) -> list[str]:
    """Names of what is in a folder (one listing); none where it is not there."""
    fs, inner = open_fs(folder)
    paths = [entry["name"].rstrip("/") for entry in _ls(fs, inner)]
    # S3's console marks a folder by an object of its name.
    return [path.rsplit("/", 1)[-1] for path in paths if path != inner.rstrip("/")]


@_names_errors
def remove_file(path: str) -> None:
    """Remove a file; nothing happens where it is not there."""
    fs, inner = open_fs(path)
    with suppress(FileNotFoundError):
        fs.rm_file(inner)


@_names_errors
def remove_folder(path: str) -> None:
    """Remove a folder and what is in it; nothing happens where it is not there."""
    fs, inner = open_fs(path)
    with suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, _json(value))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


@_names_errors
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


@_names_errors
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
                raise UserError(f"{mask(pattern)}: no such file or folder")
            if info["type"] == "directory":
                files = {name: i for name, i in fs.find(inner, detail=True).items() if name.endswith(suffixes)}
                roots.append(inner)
            else:
                files = {inner: info}
                roots.append(parent)
        twice = found.keys() & files.keys()
        if twice:
            raise UserError(f"{mask(path)}: names {mask(min(twice))} twice")
        found |= files
    if not found:
        raise UserError(f"{mask(path)}: no {' or '.join(suffixes)} files there")
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
    """A shard's name in file names and columns: its path below the corpus root, percent-encoded."""
    return quote(relative, safe="")


def fingerprint(settings: Any) -> str:
    """16 hex digits over the canonical JSON of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def sha256_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in ("raysys", "ray", "torch", "open_clip_torch", "onnxruntime", "paddleocr", "pyarrow"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def git_commit() -> str | None:
    """Commit of the checkout that runs, None for an installed copy."""
    folder = Path(__file__).parent
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


@dataclass
class Output:
    """A folder of raysys's own: ``settings.json`` first, ``manifest.json`` last."""

    path: str
    verb: str
    fingerprint: str
    finished: bool
    """A manifest is there: an earlier call with the same settings ended."""
    started: float = field(default_factory=time.time)

    def join(self, *parts: str) -> str:
        return join(self.path, *parts)

    def forget(self) -> None:
        """Remove what an earlier step of this call began in a folder that has come to nothing."""
        remove_folder(self.path)

    def finish(self, counts: dict[str, Any], **more: Any) -> None:
        """Write the manifest: the work is done."""
        write_json(
            self.join("manifest.json"),
            {
                "verb": self.verb,
                "fingerprint": self.fingerprint,
                "counts": counts,
                **as_written(more),
                "seconds": round(time.time() - self.started, 1),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
                "git_commit": git_commit(),
            },
        )


@_names_errors
def open_output(path: str, verb: str, settings: dict[str, Any], *, not_in_fingerprint: tuple[str, ...] = ()) -> Output:
    """Make an output folder, or take up the one that an earlier call with the same settings left.

    The fingerprint goes by what the settings mean: values of variables count, credentials in URLs do not.

    :param not_in_fingerprint: top-level keys of ``settings`` that may differ between calls (sizes of pools).
    :raises UserError: where the folder is not empty and not ours, or of other settings (the keys are named).
    """
    if absolute(path) != path and os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR"):
        raise UserError(
            f"output={path} lies in a folder that Ray deletes after the job; give an absolute path on storage that stays"
        )
    path = absolute(path)
    mark = fingerprint(_map_texts({k: v for k, v in settings.items() if k not in not_in_fingerprint}, _without_credentials))
    settings = as_written(settings)
    settings_file = join(path, "settings.json")
    created = False
    fs, inner = open_fs(path)
    if fs.exists(inner) and not fs.isdir(inner):
        raise UserError(f"output={mask(path)} is a file; give a folder")
    if not exists(settings_file):
        if fs.exists(inner) and any(not name.startswith(".tmp-") for name in list_names(path)):
            raise UserError(f"output={mask(path)} is not empty and has no settings.json of raysys; give a new folder")
        created = write_new_json(settings_file, {"verb": verb, "fingerprint": mark, "settings": settings})
    if not created:
        old = read_json(settings_file)
        if not isinstance(old, dict) or old.get("verb") != verb:
            raise UserError(f"output={mask(path)} belongs to another program or verb; give a new folder")
        if old["fingerprint"] != mark:
            variables = sorted({f"${{oc.env:{name}}} has another value" for _, name, _ in _interpolated()})
            changed = sorted(_differences(as_written(old["settings"]), settings, not_in_fingerprint)) or variables
            raise UserError(
                f"output={mask(path)} was begun with other settings ({', '.join(changed)}); "
                "repeat the words of then, or give a new folder"
            )
    return Output(path, verb, mark, finished=exists(join(path, "manifest.json")))


def _differences(old: Any, new: Any, skip: tuple[str, ...] = (), prefix: str = "") -> list[str]:
    """Dotted keys in which two settings differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new} if k not in skip]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), (), f"{prefix}{k}.")]
    return [] if old == new else [f"{prefix.rstrip('.')}: {json.dumps(old)} -> {json.dumps(new)}"]


def settings_of(cfg: Any, *drop: str) -> dict[str, Any]:
    """A config as plain values for settings.json, less the keys that never change a result."""
    return {key: value for key, value in asdict(cfg).items() if key not in ("output", "ray", *drop)}


def require_finished(path: str, verb: str) -> dict[str, Any]:
    """The manifest of another verb's output. :raises UserError: where it is missing, foreign or unfinished."""
    if not exists(join(path, "settings.json")):
        raise UserError(f"{mask(path)}: not a folder that `raysys {verb}` wrote (no settings.json)")
    if not exists(join(path, "manifest.json")):
        raise UserError(f"{mask(path)}: `raysys {verb}` has not finished there; run it again with the same words")
    manifest = read_json(join(path, "manifest.json"))
    if manifest.get("verb") != verb:
        raise UserError(f"{mask(path)}: written by `raysys {manifest.get('verb')}`, not by `raysys {verb}`")
    return manifest
