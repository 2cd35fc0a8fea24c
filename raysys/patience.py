"""Storage that fails: what passes is waited for, what does not is told in one line.

In: a remote filesystem of fsspec; errors of files. Out: :class:`Patient`, which asks again for a while; for errors that no new try mends,
whether they are such (:func:`is_final`) and the words (:func:`explained`); the words for what the user mends (:func:`refused`). Local paths
are never tried again: a network mount does that by itself.
"""

from __future__ import annotations

import errno
import functools
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import fsspec

from raysys.console import warn
from raysys.errors import UserError, WorkFailed
from raysys.masking import mask

T = TypeVar("T")
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
_MENDS = {
    FileNotFoundError: "check the path",
    PermissionError: "give this user, or its credentials, the right to it",
    NotADirectoryError: "a part of the path is a file: check the path",
    IsADirectoryError: "it is a folder: give a file",
    **dict.fromkeys((ConnectionError, TimeoutError), "check the address and the network"),
}
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


class Patient:
    """A remote filesystem whose operations, and requests of files opened for reading, are tried again through errors that pass.

    An opened file asks again for just the range that failed: what was read stays, and its etag still must be the same.
    """

    def __init__(self, below: fsspec.AbstractFileSystem, url: str) -> None:
        self.below, self._url = below, url

    def __getattr__(self, name: str) -> Any:
        if name == "below":  # of a copy that is not made yet
            raise AttributeError(name)
        found = getattr(self.below, name)
        return functools.partial(insist, self._url, found) if name in _OPERATIONS else found

    def open(self, path: str, mode: str = "rb", **how: Any) -> Any:
        file = insist(self._url, self.below.open, path, mode, **how)
        if mode == "rb" and getattr(file, "cache", None) is not None:
            file.cache.fetcher = functools.partial(insist, self._url, file.cache.fetcher)
        return file


def insist(url: str, call: Callable[..., T], *args: Any, **kwargs: Any) -> T:
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
            warn(f"{url}: {said}; trying again for up to {RETRY_S:.0f} s")
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


def refused(error: OSError) -> UserError | None:
    """One line for the user, of an error that the words or the machine can mend; None for any other, and where it names no file or URL, which
    :mod:`raysys.storage` always does: that is a bug."""
    cause = getattr(error, "cause", error)
    mend = next((mend for kind, mend in _MENDS.items() if isinstance(cause, kind)), None)
    return UserError(f"{mask(str(cause.filename))}: {cause.strerror or cause}; {mend}") if mend and cause.filename else None


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
