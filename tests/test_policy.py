"""Evidence -> verdict, on rows made by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa
import pytest

from raysys.config import PolicyConfig
from raysys.policy.policy import caption_overlap, judge
from raysys.regions.annotator import SCHEMA


def _region(
    x0: float, y0: float, x1: float, y1: float, text: str = "sale", score: float = 0.9, text_score: float = 0.9
) -> dict[str, object]:
    return {
        "polygon": [x0, y0, x1, y0, x1, y1, x0, y1],
        "score": score,
        "area": (x1 - x0) * (y1 - y0),
        "text": text,
        "text_score": text_score,
    }


def _row(
    *regions: dict[str, object], caption: tuple[str, ...] = ("a dog",), text_area: float | None = None, error: str | None = None
) -> dict[str, object]:
    area = sum(float(r["area"]) for r in regions) if text_area is None else text_area  # type: ignore[arg-type]
    return {"caption": list(caption), "regions": list(regions), "text_area": None if error else area, "error": error}


def _judge(policy: PolicyConfig, *rows: dict[str, object]) -> list[str | None]:
    schema = pa.schema([SCHEMA.field(c) for c in ("caption", "regions", "text_area", "error")])
    verdict = judge(pa.Table.from_pylist(list(rows), schema=schema), policy)
    assert verdict["keep"].to_pylist() == [r is None for r in verdict["reason"].to_pylist()]
    return verdict["reason"].to_pylist()


PAPER = PolicyConfig()
NONE = PolicyConfig(name="none", max_text_area=1.0)


def test_paper_drops_every_counting_region() -> None:
    assert _judge(PAPER, _row(), _row(_region(0, 0, 0.01, 0.01))) == [None, "text_area"]


def test_what_does_not_count_does_not_drop() -> None:
    faint = _region(0, 0, 0.5, 0.5, score=0.35)
    unread = _region(0, 0, 0.5, 0.5, text_score=0.3)
    one_letter = _region(0, 0, 0.5, 0.5, text="I.")
    assert _judge(PAPER, _row(faint), _row(unread), _row(one_letter), _row(faint, _region(0, 0, 0.1, 0.1))) == [
        None,
        None,
        None,
        "text_area",
    ]


def test_height_is_of_the_picture() -> None:
    policy = dataclasses.replace(PAPER, min_height_frac=0.05)
    assert _judge(policy, _row(_region(0, 0, 0.5, 0.04)), _row(_region(0, 0, 0.5, 0.06))) == [None, "text_area"]


def test_none_keeps_text_but_never_a_broken_or_captionless_sample() -> None:
    rows = [_row(_region(0, 0, 1, 1)), _row(error="undecodable"), _row(caption=())]
    assert _judge(NONE, *rows) == [None, "undecodable", "no_caption"]


def test_area_counts_overlap_once_and_only_what_counts() -> None:
    a, b = _region(0, 0, 0.4, 0.5), _region(0, 0, 0.4, 0.5)
    ghost = _region(0.5, 0.5, 1, 1, score=0.35)
    policy = PolicyConfig(name="area", max_text_area=0.3)
    # union of all: .2 + .25 (ghost); of those that count: .2, though their sum is .4
    assert _judge(policy, _row(a, b, ghost, text_area=0.45)) == [None]
    assert _judge(dataclasses.replace(policy, max_text_area=0.15), _row(a, b, ghost, text_area=0.45)) == ["text_area"]


def test_number_of_regions() -> None:
    policy = PolicyConfig(max_text_area=1.0, max_regions=1)
    one = _region(0, 0, 0.1, 0.1)
    assert _judge(policy, _row(one), _row(one, one)) == [None, "too_many_regions"]


def test_parrot_drops_only_repeated_captions() -> None:
    policy = PolicyConfig(name="parrot", max_text_area=1.0, max_caption_overlap=0.3)
    rows = [
        _row(_region(0, 0, 1, 1, text="Keep calm and carry on"), caption=("keep calm and carry on mug",)),
        _row(_region(0, 0, 1, 1, text="EXIT"), caption=("people in a train station",)),
        _row(_region(0, 0, 1, 1, text="KEEPCALM"), caption=("keep calm",)),
        _row(caption=("keep calm",)),
    ]
    assert _judge(policy, *rows) == ["caption_overlap", None, "caption_overlap", None]


@pytest.mark.parametrize(
    ("caption", "text", "share"),
    [
        ("red apple", "RED APPLE", 1.0),
        ("red apple", "apqle", 0.5),  # one letter misread in five
        ("a red car", "cor", 0.0),  # short words must match to the letter
        ("", "anything", 0.0),
        ("straße Übung", "STRASSE ÜBUNG", 1.0),
    ],
)
def test_overlap_is_the_share_of_the_captions_words(caption: str, text: str, share: float) -> None:
    assert caption_overlap([caption], [text]) == pytest.approx(share)


def test_overlap_takes_the_worst_of_several_captions() -> None:
    assert caption_overlap(["a dog", "big sale"], ["BIG SALE"]) == 1.0


def test_no_rows() -> None:
    assert _judge(PAPER) == []


def test_vectorised_equals_row_by_row() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(200):
        corners = np.sort(rng.random((int(rng.integers(0, 5)), 2, 2)), axis=1)
        regions = [
            _region(*map(float, c.reshape(-1)), text="ab"[: int(rng.integers(1, 3))], score=float(rng.random())) for c in corners
        ]
        rows.append(_row(*regions, text_area=float(min(1, sum(r["area"] for r in regions)))))  # type: ignore[misc]
    for policy in (PAPER, PolicyConfig(max_text_area=0.2), PolicyConfig(max_text_area=1, max_regions=1)):
        assert _judge(policy, *rows) == [reason for row in rows for reason in _judge(policy, row)]
