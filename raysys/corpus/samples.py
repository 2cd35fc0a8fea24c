"""What every format gives: samples, parts of shards, and the checks that all formats share."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field

UNSAFE_NAME = "unsafe_name"
CAPTION_NOT_UTF8 = "caption_not_utf8"
BAD_RECORD = "bad_record"
DUPLICATE_KEY = "duplicate_key"
SAMPLE_REASONS = {
    UNSAFE_NAME: "its name is absolute or climbs out of its folder (..)",
    CAPTION_NOT_UTF8: "no caption of it is valid UTF-8",
    BAD_RECORD: "its line of the captions file cannot be read, or its .txt or .json has more than 16 MB",
    DUPLICATE_KEY: "an earlier sample of the shard has the same key",
}
"""Why a sample is not used although its picture may be good."""


class DamagedShard(ValueError):
    """The shard ends early or is none; what came before stays good."""


@dataclass
class Sample:
    index: int
    """Position within the shard."""
    key: str
    image: bytes | None = None
    offset: int = -1
    size: int = -1
    """Bytes of the image member within the shard; -1 where it is missing, or the format has no such place."""
    captions: list[str] = field(default_factory=list)
    metadata: bytes = b""
    """The .json member as it is; empty where there is none."""
    uid: str | None = None
    """128 bits as 32 hex digits, where the corpus has them (DataComp)."""
    error: str | None = None
    """One of ``SAMPLE_REASONS``."""


@dataclass(frozen=True)
class Part:
    """A range of a shard."""

    first: int
    """Index of its first sample."""
    count: int
    """Samples."""
    start: int
    end: int
    """Bytes of a tar, row groups of a Parquet file, lines of a captions file."""


@dataclass
class Plan:
    """How a large shard is cut."""

    identity: str
    """Of the shard that was cut; a changed shard needs a new plan."""
    parts: list[Part]
    damaged: str
    """Why the shard breaks off after the last part; empty for a sound one."""


def shard_hash(name: str) -> int:
    """64 bits of a shard's name: the same in any process, order and selection."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def is_unsafe(name: str) -> bool:
    return name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or "\0" in name


def printable(name: str) -> str:
    """A name whose bytes are no UTF-8 (lone surrogates) as text that Arrow takes: ``\\xe9`` for each."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def as_uid(value: object) -> str | None:
    """A 128-bit uid in lower case, None for anything else."""
    return value.lower() if isinstance(value, str) and re.fullmatch(r"[0-9a-fA-F]{32}", value) else None


def clean_captions(captions: list[str]) -> tuple[list[str], str | None]:
    """Captions that say something and are valid Unicode; and the reason where none is left because of that.

    Bytes that are not UTF-8 come in as lone surrogates (``errors="surrogateescape"``).
    """
    said = [caption.strip() for caption in captions if caption.strip()]
    good = [caption for caption in said if not re.search("[\ud800-\udfff]", caption)]
    return good, CAPTION_NOT_UTF8 if said and not good else None
