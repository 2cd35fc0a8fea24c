"""Files and folders, local or on any fsspec filesystem: listing, ranged reads, whole-or-nothing writes, output folders.

In: paths and URLs as users write them. Out: bytes, sorted lists of files, and :class:`Output`, a folder that knows whose it is.
Leaves to others what stands in the files.
"""

from __future__ import annotations

import glob as _glob
import hashlib
import itertools
import json
import os
import platform
import re
import subprocess
import time
import uuid
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
from fsspec.implementations.local import LocalFileSystem


class UserError(ValueError):
    """A mistake in the words or the input: one line that names it and the mend; the command exits with status 2."""


def open_fs(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """Filesystem of a path or URL, and the path within it (absolute for local ones)."""
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ValueError, ImportError) as error:
        raise UserError(f"{mask(path)}: {error}") from error
    return fs, os.path.abspath(inner) if isinstance(fs, LocalFileSystem) else inner


def is_local(path: str) -> bool:
    return "://" not in path or path.startswith("file://")


def absolute(path: str) -> str:
    """The path as any process on this machine sees it; URLs stay as they are."""
    return os.path.abspath(path) if is_local(path) else path


def join(folder: str, *parts: str) -> str:
    return "/".join([folder.rstrip("/"), *parts])


def mask(path: str) -> str:
    """Hide credentials in a URL (``s3://key:secret@host/...``)."""
    return re.sub(r"(://)[^/@]+@", r"\1***@", path)


def exists(path: str) -> bool:
    fs, inner = open_fs(path)
    return fs.exists(inner)


def read_bytes(path: str) -> bytes:
    fs, inner = open_fs(path)
    return fs.cat_file(inner)


def read_json(path: str) -> Any:
    """:raises UserError: where the file is missing or is no JSON."""
    try:
        return json.loads(read_bytes(path))
    except FileNotFoundError as error:
        raise UserError(f"{mask(path)}: no such file") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{mask(path)}: not valid JSON ({error})") from error


def write_bytes(path: str, data: bytes, *, tmp_folder: str | None = None) -> None:
    """Write a file whole or not at all: local ones by rename, objects by a single PUT.

    ``tmp_folder`` (same filesystem) takes the unfinished file where the target's folder must hold nothing else.
    """
    fs, inner = open_fs(path)
    if not isinstance(fs, LocalFileSystem):
        fs.pipe_file(inner, data)
        return
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    folder = open_fs(tmp_folder)[1] if tmp_folder else os.path.dirname(inner)
    os.makedirs(folder, exist_ok=True)
    unfinished = os.path.join(folder, f".tmp-{uuid.uuid4().hex}")
    with open(unfinished, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, inner)


def write_json(path: str, value: Any) -> None:
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def identity(path: str) -> str:
    """Size and etag or modification time: what changes when a file does."""
    fs, inner = open_fs(path)
    info = fs.info(inner)
    stamp = info.get("ETag") or info.get("etag") or info.get("mtime") or info.get("LastModified")
    return f"{info['size']}:{stamp}"


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


def list_files(path: str, suffix: str) -> tuple[str, list[str]]:
    """Files with a suffix in a folder, glob or brace list.

    :returns: the root that they share (a folder) and their sorted paths relative to it.
    :raises UserError: where nothing is found.
    """
    found: list[str] = []
    root: str | None = None
    for pattern in expand_braces(path):
        fs, inner = open_fs(pattern)
        if fs.isdir(inner):
            root = inner
            found += [f for f in fs.find(inner) if f.endswith(suffix)]
        elif _glob.has_magic(inner):
            found += [f for f in fs.glob(inner) if not fs.isdir(f)]
        elif fs.exists(inner):
            found.append(inner)
        else:
            raise UserError(f"{mask(pattern)}: no such file or folder")
    if not found:
        raise UserError(f"{mask(path)}: no {suffix} files there")
    if len(set(found)) < len(found):
        raise UserError(f"{mask(path)}: names a file twice")
    if root is None:
        root = os.path.commonpath([os.path.dirname(f) for f in found])
    protocol = "" if is_local(path) else path.split("://")[0] + "://"
    return protocol + root, sorted(os.path.relpath(f, root) for f in found)


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

    def finish(self, counts: dict[str, Any], **more: Any) -> None:
        """Write the manifest: the work is done."""
        write_json(
            self.join("manifest.json"),
            {
                "verb": self.verb,
                "fingerprint": self.fingerprint,
                "counts": counts,
                **more,
                "seconds": round(time.time() - self.started, 1),
                "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "versions": versions(),
                "git_commit": git_commit(),
            },
        )


def open_output(path: str, verb: str, settings: dict[str, Any], *, not_in_fingerprint: tuple[str, ...] = ()) -> Output:
    """Make an output folder, or take up the one that an earlier call with the same settings left.

    :param not_in_fingerprint: top-level keys of ``settings`` that may differ between calls (sizes of pools).
    :raises UserError: where the folder is not empty and not ours, or of other settings (the keys are named).
    """
    path = absolute(path)
    if is_local(path) and "/runtime_resources/working_dir_files/" in os.getcwd() and path.startswith(os.getcwd()):
        raise UserError(
            f"output={path} lies in a folder that Ray deletes after the job; give an absolute path on storage that stays"
        )
    mark = fingerprint({k: v for k, v in settings.items() if k not in not_in_fingerprint})
    settings_file = join(path, "settings.json")
    fs, inner = open_fs(path)
    if fs.exists(inner) and not fs.isdir(inner):
        raise UserError(f"output={mask(path)} is a file; give a folder")
    if exists(settings_file):
        old = read_json(settings_file)
        if not isinstance(old, dict) or old.get("verb") != verb:
            raise UserError(f"output={mask(path)} belongs to another program or verb; give a new folder")
        if old["fingerprint"] != mark:
            changed = sorted(_differences(old["settings"], settings, not_in_fingerprint))
            raise UserError(
                f"output={mask(path)} was begun with other settings ({', '.join(changed)}); "
                "repeat the words of then, or give a new folder"
            )
    else:
        if fs.exists(inner) and fs.ls(inner):
            raise UserError(f"output={mask(path)} is not empty and has no settings.json of raysys; give a new folder")
        write_json(settings_file, {"verb": verb, "fingerprint": mark, "settings": settings})
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
