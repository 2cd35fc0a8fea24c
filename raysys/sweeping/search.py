"""Which point comes next: the order of trials, and Optuna's search that learns from those that ended.

In: points, and the objectives of trials as they end. Out: trials in the order to run them, or one point at a time. Leaves to others what
is on disk: a call that goes on hands the points of the calls before it in again, by :meth:`Tpe.take_up` and :meth:`Tpe.tell`.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from raysys.sweeping.space import Point, Space, Span, Trial, draw, draw_values, size

if TYPE_CHECKING:
    import optuna

TRIES = 10
"""Proposals of Optuna that may repeat an earlier point before one is drawn that does not."""


def trials_of(points: list[Point], seeds: Iterable[int]) -> list[Trial]:
    """All points with the first seed, then with the second: a coarse table comes early, and trials that run side by side have their seed, thus
    the order of their samples, in common and read the same blocks from the page cache."""
    return [Trial(point, seed) for seed in seeds for point in points]


def draw_points(space: Space, *, seed: int, count: int) -> list[Point]:
    """Of a random search, each other than all before it; more points leave the first ones as they are.

    :param count: at most the size of the space.
    """
    drawn: dict[str, dict[str, Any]] = {}
    for number in itertools.count():
        if len(drawn) == count:
            break
        values = draw(space, seed, number).values
        drawn.setdefault(repr(values), values)
    return [Point(number, values) for number, values in enumerate(drawn.values())]


class Tpe:
    """Tree-structured Parzen estimator (arXiv:2304.11127), with several objectives its multi-objective form (MOTPE). Random for the first ten
    points that end. What it proposes depends on the seed, the number of the point and what was told: a search that goes on in another call
    neither repeats its first proposals nor needs a state of its own on disk."""

    def __init__(self, space: Space, *, seed: int, num_objectives: int) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = space
        self._seed = seed
        self._num_objectives = num_objectives
        self._study = optuna.create_study(directions=["maximize"] * num_objectives, sampler=self._sampler(0))
        self._distributions = {key: _distribution(said) for key, said in space.items()}
        self._asked: list[optuna.Trial] = []
        """Of each point, by its number."""
        self._known: set[str] = set()

    def propose(self) -> Point | None:
        """The next point, other than all before it where the space is finite; None where it has no other."""
        if len(self._known) >= size(self._space):
            return None
        number = len(self._asked)
        self._study.sampler = self._sampler(number)
        for _ in range(TRIES):
            trial = self._study.ask(self._distributions)
            values = {key: _value(said, trial.params[key]) for key, said in self._space.items()}
            if self._mark(values) not in self._known:
                return self._keep(trial, Point(number, values))
            self._study.tell(trial, state=_state("FAIL"))  # forgotten: TPE does not look at these
        rng = random.Random(f"{self._seed} {number} other")
        while self._mark(values) in self._known:
            values = draw_values(self._space, rng)
        point = Point(number, values)
        return self._keep(self._ask_for(point), point)

    def take_up(self, point: Point) -> None:
        """A point of an earlier call, as if proposed now; in the order of their numbers."""
        assert point.number == len(self._asked), f"point {point.number} is not the next one, {len(self._asked)}"
        self._keep(self._ask_for(point), point)

    def tell(self, number: int, objectives: tuple[float, ...] | None, *, stopped_at: int | None = None) -> None:
        """How a point ended.

        :param objectives: to be maximised; None, or a NaN among them, where the point failed: the search goes on as if it had not been.
        :param stopped_at: early stopped at this step, where it had these objectives. One objective ranks it behind all points that ended, by
            step, then by objective; several do not compare points at different steps, so it is left out.
        """
        trial = self._asked[number]
        if objectives is None or any(math.isnan(value) for value in objectives):
            self._study.tell(trial, state=_state("FAIL"))
        elif stopped_at is None:
            self._study.tell(trial, objectives, state=_state("COMPLETE"))  # raises for a wrong number of them
        elif self._num_objectives == 1:
            trial.report(objectives[0], stopped_at)
            self._study.tell(trial, state=_state("PRUNED"))
        else:
            self._study.tell(trial, state=_state("FAIL"))

    def _sampler(self, number: int) -> optuna.samplers.TPESampler:
        """A sampler of its own for each point. Trials run side by side: ``constant_liar`` keeps it away from those that run. Multivariate as
        Optuna advises for one objective, independent for several."""
        import optuna

        return optuna.samplers.TPESampler(
            seed=random.Random(f"{self._seed} {number}").getrandbits(32),
            multivariate=self._num_objectives == 1,
            constant_liar=True,
        )

    def _ask_for(self, point: Point) -> optuna.Trial:
        self._study.enqueue_trial({key: _param(said, point.values[key]) for key, said in self._space.items()})
        return self._study.ask(self._distributions)

    def _keep(self, trial: optuna.Trial, point: Point) -> Point:
        self._asked.append(trial)
        self._known.add(self._mark(point.values))
        return point

    def _mark(self, values: dict[str, Any]) -> str:
        return repr([values[key] for key in self._space])


def _state(name: str) -> optuna.trial.TrialState:
    import optuna

    return optuna.trial.TrialState[name]


def _distribution(said: list[Any] | Span) -> optuna.distributions.BaseDistribution:
    """Of a list: its indices, as Optuna takes 1 and true for one choice."""
    import optuna

    if isinstance(said, list):
        return optuna.distributions.CategoricalDistribution(range(len(said)))
    low, high = said["low"], said["high"]
    if isinstance(low, int) and isinstance(high, int):
        return optuna.distributions.IntDistribution(low, high, log=said["log"])
    return optuna.distributions.FloatDistribution(low, high, log=said["log"])


def _value(said: list[Any] | Span, param: Any) -> Any:
    return said[param] if isinstance(said, list) else param


def _param(said: list[Any] | Span, value: Any) -> Any:
    return [repr(listed) for listed in said].index(repr(value)) if isinstance(said, list) else value
