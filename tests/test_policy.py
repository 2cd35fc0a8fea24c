"""Evidence -> verdict, on rows made by hand."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import shapely
from rapidfuzz.distance import Levenshtein

from raysys.config import PolicyConfig
from raysys.policy.policy import COLUMNS, caption_overlap, judge
from raysys.regions.annotations import SCHEMA, Counts


def _region(
    x0: float,
    y0: float,
    x1: float,
    y1: float,
    text: str | None = "sale",
    score: float = 0.9,
    text_score: float | None = 0.9,
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


def _table(rows: Iterable[dict[str, object]]) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=pa.schema([SCHEMA.field(c) for c in COLUMNS]))


def _judge(policy: PolicyConfig, *rows: dict[str, object]) -> list[str | None]:
    verdict = judge(_table(rows), policy)
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


@pytest.mark.parametrize(
    ("caption", "text"),
    [
        ("sale", "SULE"),  # two of three pairs of letters spoilt by one edit
        ("keep", "K E E P"),  # found only in the line read without its spaces
        ("strasse", "straße"),  # other letters once case-folded
        ("straße", "strasse"),
        ("landmark", "lxndmxrk"),
        ("a", "a a"),
    ],
)
def test_no_shortcut_hides_a_word_that_stands_there(caption: str, text: str) -> None:
    policy = PolicyConfig(max_text_area=1.0, max_caption_overlap=0.3)
    assert _judge(policy, _row(_region(0, 0, 1, 1, text=text), caption=(caption,))) == ["caption_overlap"]


def test_overlap_takes_the_worst_of_several_captions() -> None:
    assert caption_overlap(["a dog", "big sale"], ["BIG SALE"]) == 1.0


def test_no_rows() -> None:
    assert _judge(PAPER) == []


def test_the_first_reason_that_holds_is_the_reason() -> None:
    policy = PolicyConfig(max_regions=1, max_text_area=0.1, max_caption_overlap=0.3)
    big, small = _region(0, 0, 0.5, 0.5, text="a dog"), _region(0, 0, 0.1, 0.1, text="a dog")
    rows = [
        _row(big, big, caption=(), error="too_large"),
        _row(big, big, caption=()),
        _row(big, big),
        _row(big),
        _row(small),
        _row(_region(0, 0, 0.1, 0.1, text="cat")),
    ]
    assert _judge(policy, *rows) == ["too_large", "no_caption", "too_many_regions", "text_area", "caption_overlap", None]


def test_only_counting_regions_are_too_many() -> None:
    policy = PolicyConfig(max_text_area=1.0, max_regions=0)
    assert _judge(policy, _row(_region(0, 0, 1, 1, score=0.1)), _row(_region(0, 0, 1, 1))) == [None, "too_many_regions"]


def test_text_of_what_does_not_count_repeats_no_caption() -> None:
    policy = PolicyConfig(max_text_area=1.0, max_caption_overlap=0.3)
    unsure = _region(0, 0, 1, 1, text="a dog", text_score=0.2)
    assert _judge(policy, _row(unsure, _region(0, 0, 1, 1, text="exit"))) == [None]


def test_without_recognition_boxes_count_where_no_text_is_asked_for() -> None:
    box = _region(0, 0, 0.5, 0.5, text=None, text_score=None)
    by_box = PolicyConfig(min_text_score=0.0, min_text_chars=0)
    assert _judge(by_box, _row(box), _row()) == ["text_area", None]
    assert _judge(dataclasses.replace(by_box, max_text_area=1.0, max_caption_overlap=0.3), _row(box)) == [None]
    assert _judge(PAPER, _row(box)) == [None]


def test_nulls_where_a_list_or_a_region_should_be() -> None:
    region = _region(0.5, 0.5, 0.8, 0.9, text="a dog")
    rows = [
        {"caption": ["a dog"], "regions": None, "text_area": None, "error": None},
        {"caption": None, "regions": None, "text_area": None, "error": None},
        {"caption": ["a dog"], "regions": [None, region], "text_area": None, "error": None},
        {"caption": [None, "a dog"], "regions": [region], "text_area": None, "error": None},
    ]
    lenient = PolicyConfig(min_score=0.0, min_text_score=0.0, min_text_chars=0, min_height_frac=0.3)
    assert _judge(lenient, *rows) == [None, "no_caption", "text_area", "text_area"]
    # .12 of the picture, by geometry: no union is stored
    assert _judge(dataclasses.replace(lenient, max_text_area=0.11), *rows) == [None, "no_caption", "text_area", "text_area"]
    assert _judge(dataclasses.replace(lenient, max_text_area=0.13), *rows) == [None, "no_caption", None, None]
    parrot = dataclasses.replace(lenient, max_text_area=1.0, max_caption_overlap=0.3)
    assert _judge(parrot, *rows) == [None, "no_caption", "caption_overlap", "caption_overlap"]


def test_as_much_text_as_the_limit_is_kept() -> None:
    policy = PolicyConfig(max_text_area=0.1)
    exact, ghost = _region(0, 0, 0.2, 0.5), _region(0.5, 0.5, 1, 1, score=0.1)  # float32(.1) is more than .1
    assert _judge(policy, _row(exact, text_area=0.1), _row(exact, ghost, text_area=0.35)) == [None, None]


def test_letters_of_any_script_count() -> None:
    rows = [_row(_region(0, 0, 1, 1, text=text)) for text in ("é!", "éa", "営業", "٣٤", "a-b", "…—")]
    assert _judge(PAPER, *rows) == [None, "text_area", "text_area", "text_area", "text_area", None]


def test_any_chunks_give_the_same_verdicts() -> None:
    rng = np.random.default_rng(5)
    table = _table(_random_row(rng) for _ in range(400))
    for policy in (PAPER, PolicyConfig(max_text_area=0.1), PolicyConfig(max_text_area=1.0, max_caption_overlap=0.2)):
        whole = judge(table, policy)
        chunks = [table.slice(0, 1), table.slice(1, 0), table.slice(1, 250), table.slice(251)]
        assert judge(pa.concat_tables(chunks), policy).equals(whole)
        captions, regions = table["caption"].chunk(0), table["regions"].chunk(0)  # columns that break at different rows
        uneven = table.set_column(0, "caption", pa.chunked_array([captions[:100], captions[100:]]))
        uneven = uneven.set_column(1, "regions", pa.chunked_array([regions[:7], regions[7:300], regions[300:]]))
        assert judge(uneven, policy).equals(whole)
        assert judge(uneven.slice(93, 240), policy).equals(whole.slice(93, 240))


def test_columns_too_large_for_one_array_are_not_joined() -> None:
    chunk = _table([_row(caption=("x" * (1 << 26),)), _row(_region(0, 0, 1, 1))])
    table = pa.concat_tables([chunk] * 40)  # 2.5 GiB of captions, past the offsets of one array; shared, so 64 MiB of memory
    policy = PolicyConfig(max_text_area=1.0, max_caption_overlap=0.3)
    assert judge(table, policy)["reason"].to_pylist() == [None, None] * 40


WORDS = ["a", "the", "red", "dog", "sale", "apple", "apples", "grocery", "photograph", "straße", "übung", "mañana", "2024", "x_y"]


def _random_row(rng: np.random.Generator) -> dict[str, object]:
    """With everything that real rows have, and whatever could trip a vectorised rule: turned boxes that overlap, misread letters."""

    def text() -> str | None:
        words = [str(w) for w in rng.choice(WORDS, int(rng.integers(0, 4)))]
        for i, word in enumerate(words):
            at, kind = int(rng.integers(0, len(word))), int(rng.integers(0, 6))
            words[i] = [
                word,
                word.upper(),
                word[:at] + "q" + word[at + 1 :],
                word[:at] + word[at + 1 :],
                word[:at] + "l" + word[at:],
                word,
            ][kind]
        return None if rng.random() < 0.05 else rng.choice(["", " ", " ", ", "]).join(words)

    def region() -> dict[str, object]:
        middle, half, turn = rng.uniform(0.3, 0.7, 2), rng.uniform(0.01, 0.2, 2), rng.uniform(-1, 1)
        axes = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        corners = (middle + (half * [[-1, -1], [1, -1], [1, 1], [-1, 1]]) @ axes).astype(np.float32)
        return {
            "polygon": corners.reshape(-1).tolist(),
            "score": float(rng.uniform(0.3, 1)),
            "area": float(4 * half[0] * half[1]),
            "text": text(),
            "text_score": None if rng.random() < 0.1 else float(rng.uniform(0.3, 1)),
        }

    error = "undecodable" if rng.random() < 0.05 else None
    regions = [] if error or rng.random() < 0.2 else [region() for _ in range(int(rng.geometric(0.4)))]
    captions = [" ".join(rng.choice(WORDS, int(rng.integers(0, 9)))) for _ in range(int(rng.integers(0, 3)))]
    text_area = None if error or rng.random() < 0.1 else _union(regions)
    return {"caption": captions, "regions": regions, "text_area": text_area, "error": error}


def _union(regions: list[dict[str, object]]) -> float:
    return float(shapely.union_all([shapely.Polygon(np.reshape(r["polygon"], (4, 2))) for r in regions]).area)  # type: ignore[call-overload]


def _plainly_counts(region: dict[str, Any], policy: PolicyConfig) -> bool:
    ys = region["polygon"][1::2]
    return (
        region["score"] >= policy.min_score
        and (region["text_score"] or 0) >= policy.min_text_score
        and sum(c.isalnum() for c in region["text"] or "") >= policy.min_text_chars
        and max(ys) - min(ys) >= policy.min_height_frac
    )


def _plain_reason(row: dict[str, object], policy: PolicyConfig) -> str | None:
    """The rules as README has them, for one row, without a shortcut."""
    if row["error"] is not None:
        return str(row["error"])
    if not row["caption"]:
        return "no_caption"
    counting = [region for region in row["regions"] or [] if _plainly_counts(region, policy)]  # type: ignore[attr-defined]
    if policy.max_regions is not None and len(counting) > policy.max_regions:
        return "too_many_regions"
    if counting and (policy.max_text_area == 0 or _union(counting) > policy.max_text_area):
        return "text_area"
    lines = [re.findall(r"\w+", (r["text"] or "").casefold()) for r in counting]
    for caption in row["caption"]:  # type: ignore[attr-defined]
        words = re.findall(r"\w+", caption.casefold())
        found = 0
        for word in words:
            near = any(Levenshtein.distance(word, read) <= len(word) // 4 for line in lines for read in line)
            found += near or (len(word) >= 4 and any(word in "".join(line) for line in lines))
        if words and found / len(words) > policy.max_caption_overlap:
            return "caption_overlap"
    return None


@pytest.mark.parametrize(
    "policy",
    [
        PolicyConfig(),
        PolicyConfig(max_text_area=1.0),
        PolicyConfig(max_text_area=0.05),
        PolicyConfig(max_text_area=0.03, min_height_frac=0.15, max_regions=2),
        PolicyConfig(max_text_area=0.1, min_score=0.6, min_text_score=0.0, min_text_chars=0),
        PolicyConfig(max_text_area=1.0, max_caption_overlap=0.3),
        PolicyConfig(max_text_area=1.0, max_caption_overlap=0.0, min_text_chars=0, min_text_score=0.0),
        PolicyConfig(max_text_area=0.2, max_caption_overlap=0.5, min_text_chars=5),
    ],
)
@pytest.mark.parametrize("seed", [0, 1])
def test_verdicts_are_those_of_the_rules_said_plainly(policy: PolicyConfig, seed: int) -> None:
    rng = np.random.default_rng(seed)
    table = _table(_random_row(rng) for _ in range(500))
    expected = [_plain_reason(row, policy) for row in table.to_pylist()]
    assert judge(table, policy)["reason"].to_pylist() == expected


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


def test_annotate_counts_as_text_what_the_default_policy_drops() -> None:
    """The rule stands twice: annotate's summary may not import the policy."""
    read, faint, unread, short = (
        _region(0, 0, 0.1, 0.1),
        _region(0, 0, 0.1, 0.1, score=0.35),
        _region(0, 0, 0.1, 0.1, text_score=0.5),
        _region(0, 0, 0.1, 0.1, text="-a-"),
    )
    rows = [_row(read), _row(faint), _row(unread), _row(short), _row(), _row(unread, read, read), _row(error="empty")]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    assert Counts.of(table).with_text == _judge(PAPER, *rows).count("text_area") == 2
