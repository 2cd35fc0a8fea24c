"""Keys of a verb's schema, and YAML files of them: the command line and the spaces of a sweep read both here.

In: a dataclass of :mod:`raysys.config`, dotted keys, files. Out: types and plain values, or one line that names the key or the file.
"""

from __future__ import annotations

import difflib
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from raysys.config import choices, config_dir
from raysys.errors import UserError


def groups(schema: type) -> list[str]:
    """Keys of a schema that have choices in ``conf/``."""
    return [name for name, hint in get_type_hints(schema).items() if is_dataclass(hint) and (Path(config_dir()) / name).is_dir()]


def type_of(schema: type, key: str) -> Any:
    """Type of a dotted key. :raises UserError: for a key that is not there, with the nearest ones."""
    here: Any = schema
    path: list[str] = []
    for part in key.split("."):
        if get_origin(here) is dict:  # names of the user's own, as of corpus.sources
            here = get_args(here)[1]
            path.append(part)
            continue
        hints = get_type_hints(here) if is_dataclass(here) else {}
        if part not in hints:
            near = difflib.get_close_matches(part, hints, n=2)
            known = ", ".join(".".join([*path, name]) for name in (near or hints))
            raise UserError(
                f"unknown key '{key}'"
                + (f"; did you mean {known}?" if near else f"; known here: {known}" if known else f"; {'.'.join(path)} has no keys")
            )
        here = hints[part]
        path.append(part)
    return here


def read_group(group: str, choice: str, schema: type) -> dict[str, Any]:
    """Keys that a choice says: a name of ``conf/``, or a YAML file. Where the group has a name, and the file gives none, it is the file's.

    :raises UserError: where it is not there, is no YAML, or holds an unknown key.
    """
    own = choice.endswith((".yaml", ".yml")) or "/" in choice
    if not own and choice not in choices(group):
        raise UserError(
            f"{group}={choice} is not there; choose from {', '.join(choices(group))}, or give a YAML file ({group}=my.yaml)"
        )
    file = Path(choice) if own else Path(config_dir()) / group / f"{choice}.yaml"
    keys = read_keys(f"{group}={choice}", file, schema, prefix=f"{group}.")
    return ({"name": file.stem} if "name" in get_type_hints(type_of(schema, group)) else {}) | keys


def read_keys(word: str, file: Path, schema: type, *, prefix: str = "") -> dict[str, Any]:
    """Keys and values of a file. :raises UserError: with the word that named it, also for a key that the schema does not know."""
    said = load_yaml(word, file)

    def refuse_unknown(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            try:
                type_of(schema, prefix + str(key))
            except UserError as error:
                raise UserError(f"{word}: {error}") from error
            if isinstance(value, dict):
                refuse_unknown(value, f"{prefix}{key}.")

    refuse_unknown(said, prefix)
    return said


def load_yaml(word: str, file: Path) -> dict[Any, Any]:
    """By OmegaConf's loader: ``5e-4`` is a number, a key given twice an error."""
    if not file.is_file():
        raise UserError(f"{word}: no such file; check the path")
    try:
        loaded = OmegaConf.load(file)
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{word}: not valid YAML ({fold(error)}); mend the file") from error
    if not isinstance(loaded, DictConfig):
        raise UserError(f"{word}: must hold keys and values")
    return OmegaConf.to_container(loaded)  # type: ignore[return-value]


def fold(error: BaseException) -> str:
    """The message of a library on one line, with the key it names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("full_key:")), "")
    text = " ".join(line for line in lines if not line.startswith(("full_key:", "object_type=", "reference_type=")))
    return f"{key}: {text}" if key else text
