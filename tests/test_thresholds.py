"""A threshold at all its values: what the sliders of a report say."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raysys.config import PolicyConfig
from raysys.policy.policy import judge
from raysys.policy.thresholds import STOPS, borderline, scan
from raysys.regions.annotations import SCHEMA


def rows(*pictures: list[tuple[float, float, str]]) -> pa.Table:
    """Pictures as lists of regions: area, score of the reading, text."""
    return pa.Table.from_pylist(
        [
            {
                "caption": ["a red cup"],
                "regions": [
                    {"polygon": [0.0, 0.0, 1.0, 0.0, 1.0, area, 0.0, area], "score": 0.9, "area": area, "text": text, "text_score": read}
                    for area, read, text in regions
                ],
                "text_area": max((area for area, _, _ in regions), default=0.0),
                "error": None,
            }
            for regions in pictures
        ],
        schema=SCHEMA,
    )  # fmt: skip


TABLE = rows([], [(0.03, 0.8, "sale")], [(0.3, 0.5, "hello")])


@pytest.mark.parametrize("key", STOPS)
def test_every_value_is_judged_as_the_policy_judges_it_and_the_policys_own_is_among_them(key: str) -> None:
    policy = PolicyConfig(max_text_area=0.0123, max_caption_overlap=0.77, min_height_frac=0.011)
    one = scan(TABLE, policy, key)
    assert one.stops[one.own] == getattr(policy, key)
    assert (one.keep[one.own] == judge(TABLE, policy)["keep"].to_numpy()).all()
    numbers = [np.inf if stop is None else stop for stop in one.stops]
    assert numbers == sorted(set(numbers))


def test_a_row_flips_where_the_threshold_passes_it() -> None:
    one = scan(TABLE, PolicyConfig(), "max_text_area")
    assert one.keep[0].tolist() == [True, False, True]  # the second's text is read with .8, the third's with too little
    flips = one.flips()
    assert np.isinf(flips[[0, 2]]).all()
    place = int(flips[1])
    assert one.stops[place - 1] < 0.03 <= one.stops[place]


def test_a_policy_that_asks_just_what_was_stored_is_among_the_values_however_it_is_rounded() -> None:
    one = scan(TABLE, PolicyConfig(min_score=1 / 3), "min_score", at_least=1 / 3)
    assert one.own == 0 and one.stops[0] == pytest.approx(1 / 3)


def test_values_below_what_was_stored_are_not_asked() -> None:
    assert scan(TABLE, PolicyConfig(), "min_score", at_least=0.3).stops[0] == 0.3


def test_a_threshold_that_changes_nothing_says_so() -> None:
    policy = PolicyConfig()
    assert not scan(TABLE, policy, "max_caption_overlap").decides and scan(TABLE, policy, "min_text_score").decides


def test_borderline_names_the_threshold_that_must_move_the_least_and_the_value() -> None:
    policy = PolicyConfig()  # min_text_score .55
    near = borderline([scan(TABLE, policy, key) for key in STOPS], TABLE.num_rows)
    assert near.change == ["", "min_height_frac=0.0375", "min_text_score=0.5"]  # .03 high
    assert np.isinf(near.margin[0]) and near.margin[2] == pytest.approx(2 / 40)  # from .55 to .5
