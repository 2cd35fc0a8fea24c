"""Folders of raysys's own: whose they are, by which settings, and whether the work in them is done.

In: a verb, its settings. Out: :class:`Output`; the manifest of another verb's output.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from raysys.errors import UserError
from raysys.masking import as_written, mask, variables, without_credentials
from raysys.storage import (
    absolute,
    exists,
    join,
    list_names,
    names_errors,
    open_fs,
    read_json,
    remove_folder,
    write_json,
    write_new_json,
)


def fingerprint(settings: Any) -> str:
    """16 hex digits over the canonical JSON of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


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


@names_errors
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
    mark = fingerprint(without_credentials({k: v for k, v in settings.items() if k not in not_in_fingerprint}))
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
            changed_variables = [f"${{oc.env:{name}}} has another value" for name in variables()]
            changed = sorted(_differences(as_written(old["settings"]), settings, not_in_fingerprint)) or changed_variables
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
    return {key: value for key, value in asdict(cfg).items() if key not in ("output", "ray", "verbosity", *drop)}


def require_finished(path: str, verb: str) -> dict[str, Any]:
    """The manifest of another verb's output. :raises UserError: where it is missing, foreign or unfinished."""
    if not exists(join(path, "settings.json")):
        raise UserError(f"{mask(path)}: not a folder that `raysys {verb}` wrote (no settings.json); give its output")
    if not exists(join(path, "manifest.json")):
        raise UserError(f"{mask(path)}: `raysys {verb}` has not finished there; run it again with the same words")
    manifest = read_json(join(path, "manifest.json"))
    if manifest.get("verb") != verb:
        raise UserError(
            f"{mask(path)}: written by `raysys {manifest.get('verb')}`, not by `raysys {verb}`; give the output of `raysys {verb}`"
        )
    return manifest
