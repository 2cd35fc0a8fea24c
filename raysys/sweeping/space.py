"""A space of points: which keys of the train config a sweep varies, and over what.

In: ``conf/space/NAME.yaml`` or a file: dotted key -> list of values, or ``{low, high, log}``. Out: points, named, the same on every call.
"""

from __future__ import annotations

import itertools
import math
import re
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysys.config import TrainConfig, check, choices, config_dir
from raysys.storage import UserError

Values = dict[str, Any]
NOT_SWEPT = ("output", "num_workers", "use_gpu", "ray")


@dataclass
class Point:
    name: str
    values: Values
    """Dotted key -> value, ``seed`` among them where the grid is repeated."""


def read_space(space: str) -> dict[str, Any]:
    """:raises UserError: where it is not there or malformed."""
    packaged = Path(config_dir()) / "space" / f"{space}.yaml"
    path = packaged if packaged.is_file() else Path(space)
    if not path.is_file():
        raise UserError(f"space={space} is neither a file nor one of {', '.join(choices('space'))}")
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"space={space}: not valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(loaded, dict) or not loaded:
        raise UserError(f"space={space}: must map dotted keys to lists of values or {{low, high, log}}")
    for key, values in loaded.items():
        if isinstance(values, list) and values:
            continue
        if isinstance(values, dict) and {"low", "high"} <= set(values) <= {"low", "high", "log"} and values["low"] < values["high"]:
            if values.get("log") and values["low"] <= 0:
                raise UserError(f"space={space}: {key}.low must be greater than 0 where log is true")
            continue
        raise UserError(f"space={space}: {key} must be a list of values or {{low: a, high: b, log: true|false}} with a < b")
    return loaded


def points_of(space: dict[str, Any], *, num_samples: int, seed: int) -> list[Point]:
    """The grid over all lists, ``num_samples`` times; ranges are drawn anew for each, and the training seed grows by one each time."""
    lists = {key: values for key, values in space.items() if isinstance(values, list)}
    ranges = {key: values for key, values in space.items() if isinstance(values, dict)}
    points: list[Point] = []
    for repeat in range(num_samples):
        for number, combination in enumerate(itertools.product(*lists.values())):
            values: Values = dict(zip(lists, combination, strict=True))
            rng = np.random.default_rng([seed, repeat, number])
            values |= {key: _draw(rng, span) for key, span in ranges.items()}
            if num_samples > 1 and "seed" not in values:
                values["seed"] = seed + repeat
            words = "_".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in values.items())
            points.append(Point(f"{len(points):03d}_{re.sub(r'[^A-Za-z0-9_.=-]', '-', words)}", values))
    return points


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(rng: np.random.Generator, span: dict[str, Any]) -> float:
    low, high = float(span["low"]), float(span["high"])
    if span.get("log"):
        return math.exp(rng.uniform(math.log(low), math.log(high)))
    return float(rng.uniform(low, high))


def at_point(base: TrainConfig, point: Point, output: str) -> TrainConfig:
    """The config of a trial. :raises UserError: for an unknown key, a wrong type or an impossible value."""
    cfg = OmegaConf.structured(deepcopy(base))
    for key, value in point.values.items():
        if key.split(".")[0] in NOT_SWEPT:
            raise UserError(f"space: {key} is not swept; the budget and the place of a sweep are the same for all points")
        try:
            OmegaConf.update(cfg, key, value, force_add=False)
        except OmegaConfBaseException as error:
            raise UserError(f"space: {key}={value}: {str(error).splitlines()[0]}") from error
    result: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    result.output = output
    try:
        check(result)
    except ValueError as error:
        raise UserError(f"space: point {point.name}: {error}") from error
    return result


def pareto_front(scores: dict[str, tuple[float, ...]]) -> list[str]:
    """Names of the points that no other point beats: at least as good in everything and better in something."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x >= y for x, y in zip(a, b, strict=True)) and a != b

    return [name for name, own in scores.items() if not any(beats(other, own) for other in scores.values())]
