"""A space of points: which keys of the train config a sweep varies, and over what.

In: ``conf/space/NAME.yaml`` or a file: key -> list of values, or ``{low, high, log}`` for a number. Out: points with their numbers, and the
config of a trial (a point with a seed). Which point comes next in a search that learns: :mod:`raysys.sweeping.search`.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any, TypedDict, Union, get_args, get_origin, get_type_hints

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from raysys.config import QuestionsConfig, TrainConfig, check, choices, config_dir
from raysys.errors import UserError
from raysys.keys import fold, groups, load_yaml, read_group, type_of

NOT_SWEPT = {
    **dict.fromkeys(("output", "num_workers", "use_gpu", "ray"), "it says where the sweep runs, not what is learnt"),
    **dict.fromkeys((f.name for f in fields(QuestionsConfig)), "all points must be asked the same"),
    "seed": "seeds=N repeats every point",
}
"""First part of a key -> why it is the same for all points."""
NAME_CHARS = 100
"""Longest name of a point; it names a folder (255 bytes on most filesystems) and stands in tables."""


class Span(TypedDict):
    """A range of numbers: both ends are int where the key takes whole numbers, else both are float."""

    low: float
    high: float
    log: bool


Space = dict[str, list[Any] | Span]
"""Key -> what it may be, in the order of the file; plain values, as JSON holds them."""


@dataclass(frozen=True)
class Point:
    number: int
    values: dict[str, Any]
    """Key -> value as the user wrote it: ``{"policy": "paper", "augment.factor": 1}``."""

    @property
    def name(self) -> str:
        words = "_".join(f"{key.rsplit('.', 1)[-1]}={_short(value)}" for key, value in self.values.items())
        return f"{self.number:03d}_{re.sub(r'[^A-Za-z0-9_.=-]', '-', words)}"[:NAME_CHARS]


@dataclass(frozen=True)
class Trial:
    point: Point
    seed: int

    @property
    def name(self) -> str:
        return f"{self.point.name}_seed={self.seed}"


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return Path(value).stem if isinstance(value, str) and value.endswith((".yaml", ".yml")) else str(value)


# ---- the file ---------------------------------------------------------------------------------------------------------


def read_space(space: str) -> Space:
    """:param space: a name of ``conf/space`` or a YAML file.
    :raises UserError: where it is not there or malformed; :func:`check_space` checks the values."""
    packaged = Path(config_dir()) / "space" / f"{space}.yaml"
    path = packaged if packaged.is_file() else Path(space)
    if not path.is_file():
        raise UserError(f"space={space} is neither a file nor one of {', '.join(choices('space'))}")
    said = load_yaml(f"space={space}", path)
    if not said:
        raise UserError(f"space={space}: is empty; give keys of train, each with a list of values or {{low: a, high: b}}")
    return {str(key): _list_or_span(str(key), value) for key, value in said.items()}


def _list_or_span(key: str, said: Any) -> list[Any] | Span:
    if isinstance(said, dict):
        return _span(key, said)
    if not isinstance(said, list):
        raise UserError(f"space: {key}={said}: must be a list of values (one value is a list too: [{said}]) or {{low: a, high: b}}")
    if not said:
        raise UserError(f"space: {key}: the list is empty; give it values, or leave the key out")
    for value in said:
        if not isinstance(value, bool | int | float | str | None) or (isinstance(value, float) and not math.isfinite(value)):
            raise UserError(f"space: {key}: {value!r} is not one plain value (a finite number, a text, true, false or null)")
    return said


def _span(key: str, said: dict[Any, Any]) -> Span:
    form = "a range is {low: a, high: b}, or {low: a, high: b, log: true}"
    unknown = [str(name) for name in said if name not in ("low", "high", "log")]
    if unknown:
        raise UserError(f"space: {key}: unknown {', '.join(unknown)}; {form}; a key below it is written {key}.{unknown[0]}: [...]")
    if "low" not in said or "high" not in said:
        raise UserError(f"space: {key}: {'high' if 'low' in said else 'low'} is missing; {form}")
    low, high, log = said["low"], said["high"], said.get("log", False)
    if type(log) is not bool:
        raise UserError(f"space: {key}.log={log}: must be true or false")
    for end, value in (("low", low), ("high", high)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise UserError(f"space: {key}.{end}={value}: must be a number")
    if low >= high:
        raise UserError(f"space: {key}: low={low} must be less than high={high}; a single value is a list: [{low}]")
    if log and low <= 0:
        raise UserError(f"space: {key}.low={low}: must be greater than 0 where log is true")
    takes = _plain_types(_swept_type(key))
    if float in takes:
        return {"low": float(low), "high": float(high), "log": log}
    if int not in takes:
        raise UserError(f"space: {key}: takes no numbers; give a list of values")
    for end, value in (("low", low), ("high", high)):
        if value != int(value):
            raise UserError(f"space: {key}.{end}={value}: must be a whole number, as {key} is one")
    return {"low": int(low), "high": int(high), "log": log}


# ---- checks -----------------------------------------------------------------------------------------------------------


def check_space(space: Space, base: TrainConfig, search: str) -> None:
    """Set every listed value, and both ends of every range, on the base alone. Combinations are checked by :func:`at_trial`.

    :raises UserError: for a key that is unknown or not swept, a value that is impossible or listed twice, a range in a grid.
    """
    for key, said in space.items():
        hint = _swept_type(key)
        if (is_dataclass(hint) and key not in groups(TrainConfig)) or get_origin(hint) in (dict, list):
            below = [f"{key}.{name}" for name in get_type_hints(hint)] if is_dataclass(hint) else [f"{key}.NAME.weight"]
            raise UserError(f"space: {key}: is not one value; sweep keys below it ({', '.join(below)})")
        if not _is_there(base, key):
            raise UserError(f"space: {key}: the sweep's own words name no such source; give {key.rsplit('.', 1)[0]}.path=...")
        if isinstance(said, dict) and search == "grid":
            raise UserError(f"space: {key}: a grid needs lists; use search=random or search=tpe")
        seen: list[Any] = []
        tried = said if isinstance(said, list) else [said["low"], said["high"]]
        for value in tried:
            if str in _plain_types(hint) and not isinstance(value, str | None):
                raise UserError(f"space: {key}={value}: must be text; put it in quotes ('no', 'off' and '1e3' are YAML's traps)")
            cfg = _config_at(base, {key: value})
            try:
                check(cfg)
            except ValueError as error:
                raise UserError(f"space: {error}" if str(error).startswith(key) else f"space: {key}={value}: {error}") from error
            held = _value_at(cfg, key)
            if held in seen:  # as the config holds it: 1 and 1.0 are one learning rate
                raise UserError(f"space: {key}={value}: says the same as {tried[seen.index(held)]} before it; leave one out")
            seen.append(held)
        if key in groups(TrainConfig):
            _refuse_lost_words(key, space, base, seen)


def _refuse_lost_words(group: str, space: Space, base: TrainConfig, swept: list[Any]) -> None:
    """A choice of a group stands on the defaults, so ``policy.min_score=.3`` among the words would not reach any trial."""
    own = getattr(base, group)
    known = [*swept, *(_group_config(group, name) for name in choices(group))]
    differing = [[f.name for f in fields(own) if getattr(own, f.name) != getattr(other, f.name)] for other in known]
    lost = [name for name in min(differing, key=len) if f"{group}.{name}" not in space]
    if lost:
        word = f"{group}.{lost[0]}"
        raise UserError(
            f"space: {group}: its choices replace {word}={getattr(own, lost[0])} of the words; say it in the space ({word}: [...]), "
            "or in a YAML file of the list"
        )


def _swept_type(key: str) -> Any:
    """Type of a key of train. :raises UserError: where it is unknown or not swept."""
    why = NOT_SWEPT.get(key.split(".")[0])
    if why:
        raise UserError(f"space: {key}: is not swept; {why}; take it out")
    try:
        return type_of(TrainConfig, key)
    except UserError as error:
        raise UserError(f"space: {key}: {error}") from error


def _plain_types(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _is_there(base: TrainConfig, key: str) -> bool:
    """False for a name of the user's own (``corpus.sources.NAME.weight``) that the base does not have."""
    try:
        _value_at(base, key)
    except KeyError:
        return False
    return True


def _value_at(cfg: TrainConfig, key: str) -> Any:
    here: Any = cfg
    for part in key.split("."):
        here = here[part] if isinstance(here, dict) else getattr(here, part)
    return here


# ---- points -----------------------------------------------------------------------------------------------------------


def grid(space: Space) -> list[Point]:
    """All combinations of the lists, the last key fastest."""
    lists = [said for said in space.values() if isinstance(said, list)]
    assert len(lists) == len(space)  # check_space
    return [Point(i, dict(zip(space, values, strict=True))) for i, values in enumerate(itertools.product(*lists))]


def size(space: Space) -> float:
    """How many points there are; infinite with a range of fractions."""
    return math.prod(_num_values(said) for said in space.values())


def _num_values(said: list[Any] | Span) -> float:
    if isinstance(said, list):
        return len(said)
    return said["high"] - said["low"] + 1 if isinstance(said["low"], int) else math.inf


def draw(space: Space, seed: int, number: int) -> Point:
    """Point ``number`` of a random search: a function of its arguments, so that more points leave the first ones as they are."""
    return Point(number, draw_values(space, random.Random(f"{seed} {number}")))


def draw_values(space: Space, rng: random.Random) -> dict[str, Any]:
    """Lists and ranges uniformly, with ``log`` uniformly in the logarithm."""
    return {key: rng.choice(said) if isinstance(said, list) else _draw_number(said, rng) for key, said in space.items()}


def _draw_number(span: Span, rng: random.Random) -> float:
    low, high = span["low"], span["high"]
    if isinstance(low, int) and isinstance(high, int):
        if not span["log"]:
            return rng.randint(low, high)
        whole = round(math.exp(rng.uniform(math.log(low - 0.5), math.log(high + 0.5))))
        return min(max(whole, low), high)
    if not span["log"]:
        return rng.uniform(low, high)
    return min(max(math.exp(rng.uniform(math.log(low), math.log(high))), low), high)


# ---- the config of a trial --------------------------------------------------------------------------------------------


def at_trial(base: TrainConfig, trial: Trial, output: str) -> TrainConfig:
    """The config of a trial; ``base`` stays as it is. :raises UserError: for an unknown key, a wrong type or an impossible value."""
    cfg = replace(_config_at(base, trial.point.values), seed=trial.seed, output=output)
    try:
        check(cfg)
    except ValueError as error:
        raise UserError(f"space: point {trial.point.name}: {error}") from error
    return cfg


def _config_at(base: TrainConfig, values: dict[str, Any]) -> TrainConfig:
    """Groups first, then dotted keys, whatever their order."""
    chosen = {key: _group_config(key, value) for key, value in values.items() if key in groups(TrainConfig)}
    cfg = OmegaConf.structured(replace(base, **chosen, output=""))
    words = ", ".join(f"{key}={value}" for key, value in values.items())
    try:
        for key, value in values.items():
            if key not in chosen:
                words = f"{key}={value}"
                OmegaConf.update(cfg, key, value, force_add=False)
        result: TrainConfig = OmegaConf.to_object(cfg)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(f"space: {words}: {str(error).splitlines()[0]}") from error
    return replace(result, output=base.output)


def _group_config(group: str, choice: Any) -> Any:
    """The dataclass that a choice of a group makes."""
    if not isinstance(choice, str):
        raise UserError(
            f"space: {group}={choice}: must be a name of conf/{group} or a YAML file; put names like no and off in quotes"
        )
    try:
        keys = read_group(group, choice, TrainConfig)
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(type_of(TrainConfig, group)), keys))
    except UserError as error:
        raise UserError(f"space: {error}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"space: {group}={choice}: {fold(error)}") from error


def group_contents(space: Space) -> dict[str, dict[str, Any]]:
    """What the swept choices of groups say (``policy=mine.yaml`` -> its keys): settings of a sweep, as a file may change between calls."""
    return {
        f"{key}={choice}": read_group(key, choice, TrainConfig)
        for key, said in space.items()
        if key in groups(TrainConfig)
        for choice in said
    }
