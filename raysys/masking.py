"""What people may see of paths and settings: no credentials, and variables by their names.

In: texts with secrets, settings. Out: the same as they may stand on a screen or in a file, and the way back from a file.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from typing import Any

from raysys.errors import UserError

INTERPOLATED = "RAYSYS_INTERPOLATED"
"""Environment variable in which a process tells itself and its Ray workers what its words interpolate: ``KEY:NAME ...``, the first part of
a key and the variable that its value names as ``${oc.env:NAME}``; the key is empty where not the words but settings that were read name it.
No values stand in it."""
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
    values of variables that the words, or settings that were read, name, which become ``${oc.env:NAME}`` again."""
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
    """Settings that :func:`as_written` wrote, with the variables' values of now, which :func:`mask` hides from here on.

    :raises UserError: naming a variable that is not set.
    """

    def value_of(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise UserError(
                f"{match[0]} stands in the settings, and the environment variable {match[1]} is not set; set it as it was then"
            )
        _remember_read(match[1])
        return os.environ[match[1]]

    return _map_texts(settings, lambda text: _ENV.sub(value_of, text))


def remember_interpolated(written: dict[str, Any]) -> None:
    """Take down which variables the words of this process name. :param written: the config, not resolved."""
    text_of = {key: json.dumps(value) for key, value in written.items()}
    names = {name for text in text_of.values() for name in re.findall(r"\$\{oc\.env:\s*(\w+)", text)}
    keys = {key for key, text in text_of.items() if "${" in text}
    os.environ[INTERPOLATED] = " ".join(f"{key}:{name}" for key in sorted(keys) for name in sorted(names))


def _remember_read(name: str) -> None:
    """Take down a variable that settings name: under no key, so that a short value of it is not looked for in settings of this process."""
    known = os.environ.get(INTERPOLATED, "").split()
    if all(entry.split(":")[1] != name for entry in known):
        os.environ[INTERPOLATED] = " ".join([*known, f":{name}"])


def _interpolated() -> list[tuple[str, str, str]]:
    """Key, variable and its value."""
    entries = (entry.split(":") for entry in os.environ.get(INTERPOLATED, "").split())
    return [(key, name, os.environ[name]) for key, name in entries if os.environ.get(name)]


def _unresolved(text: str, values: dict[str, str]) -> str:
    """One pass: what was put in is not looked at again. :param values: variable -> value."""
    names = {value: name for name, value in values.items()}
    longest_first = "|".join(re.escape(value) for value in sorted(names, key=len, reverse=True))
    return re.sub(longest_first, lambda match: f"${{oc.env:{names[match[0]]}}}", text) if names else text


def is_masked(path: str) -> bool:
    """Whether credentials were taken out of it."""
    return _MASKED.search(path) is not None


def without_credentials(settings: Any) -> Any:
    """Settings whose URLs hold none; values of variables stay."""
    return _map_texts(settings, _without_credentials)


def variables() -> list[str]:
    """Those that the words of this process name."""
    return sorted({name for key, name, _ in _interpolated() if key})


def _without_credentials(text: str) -> str:
    return _QUERY.sub(r"\1***", _USER_INFO.sub(r"\1***@", text))


def _map_texts(value: Any, change: Callable[[str], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value
