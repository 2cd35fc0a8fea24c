"""The order of trials, and the search that learns: with Optuna itself."""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import sys
from typing import Any

import pytest

from raysys.sweeping.search import Tpe, trials_of
from raysys.sweeping.space import Point, Space, draw, grid

SMOOTH: Space = {"x": {"low": 0.0, "high": 1.0, "log": False}, "y": {"low": 1e-4, "high": 1.0, "log": True}}
LISTS: Space = {"policy": ["none", "paper"], "factor": [1, 4, 0], "flag": [None, True]}


def _hill(values: dict[str, Any]) -> float:
    """1 at x = .3, y = .01; falls off with the square of the distance, y in decades."""
    return 1 - (values["x"] - 0.3) ** 2 - (math.log10(values["y"]) + 2) ** 2 / 16


def _next(tpe: Tpe) -> Point:
    point = tpe.propose()
    assert point is not None
    return point


def _climb(tpe: Tpe, number: int) -> list[Point]:
    points = []
    for _ in range(number):
        points.append(_next(tpe))
        tpe.tell(points[-1].number, (_hill(points[-1].values),))
    return points


def test_trials_go_through_all_points_with_a_seed_before_the_next_seed() -> None:
    points = grid({"a": [1, 2, 3]})
    order = [(t.point.number, t.seed) for t in trials_of(points, range(5, 7))]
    assert order == [(0, 5), (1, 5), (2, 5), (0, 6), (1, 6), (2, 6)]


def test_search_is_imported_without_optuna() -> None:
    code = "import sys, raysys.sweeping.search; sys.exit('optuna' in sys.modules or 'ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_proposals_become_better_than_random_points() -> None:
    gain = []
    for seed in range(3):
        late = [_hill(p.values) for p in _climb(Tpe(SMOOTH, seed=seed, num_objectives=1), 40)[-10:]]
        drawn = [_hill(draw(SMOOTH, seed, i).values) for i in range(30, 40)]
        gain.append(statistics.mean(late) - statistics.mean(drawn))
    assert min(gain) > 0.05


def test_proposals_are_numbered_lie_in_the_space_and_are_silent(capfd: pytest.CaptureFixture[str]) -> None:
    space: Space = {
        "lr": {"low": 1e-4, "high": 1e-2, "log": True},
        "steps": {"low": 2, "high": 9, "log": False},
        "batch": {"low": 1, "high": 64, "log": True},
        "only": ["paper"],
        "kind": [True, "1", 1.5, None],
    }
    tpe = Tpe(space, seed=0, num_objectives=1)
    points = []
    for _ in range(25):
        points.append(_next(tpe))
        tpe.tell(points[-1].number, (points[-1].values["lr"],))
    assert [p.number for p in points] == list(range(25))
    for values in (p.values for p in points):
        assert list(values) == list(space)
        assert 1e-4 <= values["lr"] <= 1e-2
        assert type(values["steps"]) is int
        assert 2 <= values["steps"] <= 9
        assert type(values["batch"]) is int
        assert 1 <= values["batch"] <= 64
        assert values["only"] == "paper"
        assert any(values["kind"] is kind for kind in space["kind"])
    assert capfd.readouterr() == ("", "")


def test_every_point_of_a_finite_space_comes_once_then_none() -> None:
    space: Space = {"a": ["x", "y", "z"], "b": {"low": 1, "high": 4, "log": False}}
    tpe = Tpe(space, seed=0, num_objectives=1)
    values = []
    for number in range(12):
        point = _next(tpe)
        assert point.number == number
        values.append((point.values["a"], point.values["b"]))
        tpe.tell(number, (float(point.values["a"] == "x"),))  # it would rather stay where a is x
    assert sorted(values) == [(a, b) for a in "xyz" for b in (1, 2, 3, 4)]
    assert tpe.propose() is None


def test_points_that_are_still_running_are_not_proposed_again() -> None:
    tpe = Tpe(LISTS, seed=0, num_objectives=1)
    points = [_next(tpe) for _ in range(12)]
    assert len({repr(p.values) for p in points}) == 12
    assert tpe.propose() is None


def test_same_seed_proposes_the_same_and_another_seed_does_not() -> None:
    points = _climb(Tpe(SMOOTH, seed=4, num_objectives=1), 15)
    assert _climb(Tpe(SMOOTH, seed=4, num_objectives=1), 15) == points
    assert _climb(Tpe(SMOOTH, seed=5, num_objectives=1), 15) != points


@pytest.mark.parametrize("taken", [3, 17])
def test_search_taken_up_goes_on_as_if_it_had_never_stopped(taken: int) -> None:
    whole = _climb(Tpe(SMOOTH, seed=1, num_objectives=1), 25)
    tpe = Tpe(SMOOTH, seed=1, num_objectives=1)
    for point in whole[:taken]:
        tpe.take_up(point)
        tpe.tell(point.number, (_hill(point.values),))
    assert _climb(tpe, 25 - taken) == whole[taken:]


def test_points_taken_up_are_not_proposed_again() -> None:
    every = grid(LISTS)
    random.Random(0).shuffle(every)
    taken = [
        Point(i, dict(reversed(p.values.items()))) for i, p in enumerate(every[:11])
    ]  # keys in another order are the same point
    tpe = Tpe(LISTS, seed=0, num_objectives=1)
    for point in taken:
        tpe.take_up(point)
    last = _next(tpe)
    assert last == Point(11, every[11].values)
    assert tpe.propose() is None


def test_points_taken_up_with_their_objectives_are_learnt_from() -> None:
    points = [draw(SMOOTH, 0, i) for i in range(40)]
    late = []
    for sign in (1, -1):
        tpe = Tpe(SMOOTH, seed=0, num_objectives=1)
        for point in points:
            tpe.take_up(point)
            tpe.tell(point.number, (sign * _hill(point.values),))
        late.append(statistics.mean(_hill(_next(tpe).values) for _ in range(10)))
    assert late[0] > late[1] + 0.1


def test_point_is_taken_up_in_the_order_of_the_numbers() -> None:
    tpe = Tpe(SMOOTH, seed=0, num_objectives=1)
    with pytest.raises(AssertionError, match="point 1 is not the next one, 0"):
        tpe.take_up(draw(SMOOTH, 0, 1))


def test_failed_and_nan_points_leave_the_search_as_it_was_and_stopped_ones_count() -> None:
    def after(*told: tuple[tuple[float, ...] | None, int | None]) -> dict[str, Any]:
        tpe = Tpe(SMOOTH, seed=0, num_objectives=1)
        _climb(tpe, 12)
        for objectives, stopped_at in told:
            tpe.tell(_next(tpe).number, objectives, stopped_at=stopped_at)
        for _ in range(3 - len(told)):
            tpe.take_up(Point(12 + len(told), {"x": 0.5, "y": 0.5}))
            tpe.tell(12 + len(told), None)
            told = (*told, (None, None))
        return _next(tpe).values

    nothing = after()
    assert after((None, None), (None, 5), ((math.nan,), None)) == nothing
    assert after(((9.0,), None), ((9.0,), None), ((9.0,), None)) != nothing
    assert after(((0.9,), 5), ((0.9,), 5), ((0.9,), 5)) != nothing


def test_stopped_points_rank_behind_those_that_ended_however_good_they_looked() -> None:
    """Twenty points end at x < .5 with 0 .. .5, twenty are stopped at x > .5 with 9: it goes on where they ended."""
    space: Space = {"x": {"low": 0.0, "high": 1.0, "log": False}}
    tpe = Tpe(space, seed=0, num_objectives=1)
    for number in range(40):
        x = (number + 0.5) / 40
        tpe.take_up(Point(number, {"x": x}))
        tpe.tell(number, (x,) if x < 0.5 else (9.0,), stopped_at=None if x < 0.5 else 3)
    assert statistics.mean(_next(tpe).values["x"] for _ in range(10)) < 0.55


def test_several_objectives_are_weighed_together() -> None:
    """x is good for one and bad for the other, so all of it is on the front; y is bad for both."""
    space: Space = {"x": {"low": 0.0, "high": 1.0, "log": False}, "y": {"low": 0.0, "high": 1.0, "log": False}}
    tpe = Tpe(space, seed=0, num_objectives=2)
    late = []
    for number in range(60):
        point = _next(tpe)
        x, y = point.values["x"], point.values["y"]
        if number == 3:
            tpe.tell(number, None)
        elif number == 4:
            tpe.tell(number, (1.0, 1.0), stopped_at=10)
        else:
            tpe.tell(number, (x - y, 1 - x - y))
        late += [(x, y)] if number >= 40 else []
    assert statistics.mean(y for _, y in late) < 0.25
    assert max(x for x, _ in late) - min(x for x, _ in late) > 0.4


def test_wrong_number_of_objectives_is_refused() -> None:
    tpe = Tpe(SMOOTH, seed=0, num_objectives=2)
    number = _next(tpe).number
    with pytest.raises(ValueError, match="did not match"):
        tpe.tell(number, (1.0,))
