"""What each threshold of a policy decides: the policy judged again at values all over its range.

In: rows of annotations, a policy. Out: a :class:`Scan` for each threshold (what is kept at each of its values), and how near the verdict on
each row is to the other one. Only :func:`raysys.policy.policy.judge` decides, so that a slider shows what a filter would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raysys.config import PolicyConfig
from raysys.policy.policy import judge

STOPS: dict[str, list[Any]] = {
    "max_text_area": (np.linspace(0, 1, 41) ** 2).tolist(),  # finer where it matters: most text is small
    "min_score": np.linspace(0, 1, 41).tolist(),
    "min_text_score": np.linspace(0, 1, 41).tolist(),
    "min_text_chars": list(range(21)),
    "min_height_frac": np.linspace(0, 0.5, 41).tolist(),
    "max_regions": [*range(21), None],
    "max_caption_overlap": np.linspace(0, 1, 41).tolist(),
}
"""Threshold -> values of it, from one end to the other."""


@dataclass(frozen=True)
class Scan:
    """A threshold at all its values, everything else in the policy as it is."""

    key: str
    stops: list[Any]
    """Ascending; None (any number) is last."""
    keep: np.ndarray
    """bool [stops, rows]"""
    own: int
    """Place of the policy's own value in ``stops``."""

    @property
    def decides(self) -> bool:
        """Whether the threshold makes any difference here."""
        return bool((self.keep != self.keep[0]).any())

    def flips(self) -> np.ndarray:
        """float [rows]: place of the stop from which on the verdict is the other one, infinite where it never is."""
        changed = self.keep != self.keep[0]
        return np.where(changed.any(axis=0), changed.argmax(axis=0), np.inf)


def scan(table: pa.Table, policy: PolicyConfig, key: str, *, at_least: float = 0.0) -> Scan:
    """Judge the rows at every value of a threshold.

    :param table: rows with :data:`raysys.policy.policy.COLUMNS`.
    :param at_least: smallest value that may be asked (``ocr.store_score`` for ``min_score``); the policy's own is not below it.
    """
    own = getattr(policy, key)
    values = {
        _number(stop): stop if stop is None or isinstance(stop, int) else float(round(stop, 6)) for stop in [*STOPS[key], own]
    }
    stops = [values[number] for number in sorted(values) if number >= _number(at_least)]
    changes: list[dict[str, Any]] = [{key: stop} for stop in stops]
    keep = [judge(table, replace(policy, **change))["keep"].to_numpy() for change in changes]
    return Scan(key, stops, np.array(keep), [_number(stop) for stop in stops].index(_number(own)))


def _number(stop: Any) -> float:
    return np.inf if stop is None else float(round(stop, 6))


@dataclass(frozen=True)
class Borderline:
    """How near the verdict on each row is to the other one, where one threshold moves at a time."""

    margin: np.ndarray
    """float [rows]: how far the nearest threshold would have to move, as a share of its range; infinite where none would do."""
    change: list[str]
    """[rows]: that threshold and the value from which on the verdict is the other one (``min_score=0.55``); empty where none is."""


def borderline(scans: Sequence[Scan], num_rows: int) -> Borderline:
    margin, change = np.full(num_rows, np.inf), [""] * num_rows
    for one in scans:
        places = np.arange(len(one.stops))
        away = np.abs(places - one.own) / max(len(places) - 1, 1)
        distance = np.where(one.keep != one.keep[one.own], away[:, None], np.inf)
        for row in np.flatnonzero(distance.min(axis=0) < margin):
            place = int(distance[:, row].argmin())
            margin[row], change[row] = distance[place, row], f"{one.key}={written(one.stops[place])}"
    return Borderline(margin, change)


def written(stop: Any) -> str:
    """A value as one says it to a verb."""
    return "null" if stop is None else f"{stop:g}"
