"""Speed of a decision: every policy of conf/policy over a million rows of annotations, on one core.

    python tools/bench_policy.py [--rows 1000000]

The rows are drawn, with sizes as in real corpora: 43 % have regions (mean 2.6, one picture in a thousand is a page of up to 200), a fifth of
the regions counts, captions have 8 to 12 words, and where there is text, every third picture repeats words of its caption with a misread
letter. Ours is the best of three; once from columns in memory, once from a Parquet file on disk. The reference says the same row by row
in plain Python, on the first 20,000 rows; both must agree there. Goal: a million rows in two seconds.
"""

from __future__ import annotations

import argparse
import os
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from benchmark import finish, rate
from rapidfuzz.distance import Levenshtein

from raysys.cli import compose_config
from raysys.config import PolicyConfig, choices
from raysys.policy.policy import COLUMNS, judge
from raysys.regions.annotations import SCHEMA
from raysys.regions.geometry import union_areas

GOAL = 500_000
"""Rows a second."""
SLICE = 20_000
SYLLABLES = "ba co da el fi gra hu in jo ka lin mar no or pet qua ri san ter ul ver win xa yo zen sho ble ing ton er".split()  # noqa: SIM905
COMMON = "a the of in on with and at for to is by from an two red blue white old new man woman dog photo view".split()  # noqa: SIM905


def annotations(rows: int, seed: int = 0) -> pa.Table:
    """Rows as ``raysys annotate`` writes them: the columns that a policy reads."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice([1, 2, 3, 4], 30_000, p=[0.1, 0.5, 0.3, 0.1])
    rare = ["".join(rng.choice(SYLLABLES, n)) for n in lengths]
    misread = [w[: len(w) // 2] + "1" + w[len(w) // 2 + 1 :] for w in COMMON + rare]
    # Zipf: a few words make half of all text. Word i misread is word len(vocabulary) + i.
    vocabulary = pa.array(COMMON + rare + misread)
    num_words = len(vocabulary) // 2

    def words(count: int) -> np.ndarray:
        return np.minimum((num_words + 1) ** rng.random(count) - 1, num_words - 1).astype(np.int64)

    captioned = rng.random(rows) >= 0.01
    caption_words = rng.integers(8, 13, rows)
    caption_ends = np.cumsum(caption_words)
    caption_ids = words(caption_ends[-1])
    lines = pc.binary_join(_lists(vocabulary.take(caption_ids), caption_words), " ")
    captions = _lists(lines.filter(pa.array(captioned)), captioned.astype(np.int64))

    broken = rng.random(rows) < 0.02
    count = np.where((rng.random(rows) < 0.43) & ~broken, rng.geometric(0.4, rows), 0)
    count = np.where((count > 0) & (rng.random(rows) < 0.001), rng.integers(20, 201, rows), count)
    owner = np.repeat(np.arange(rows), count)
    n = len(owner)
    polygons, area = _boxes(rng, n)
    per_line = rng.integers(1, 5, n)
    line_of = np.repeat(np.arange(n), per_line)
    place = (
        np.arange(len(line_of)) - np.repeat(np.cumsum(per_line) - per_line, per_line) + np.repeat(rng.integers(0, 8, n), per_line)
    )
    repeats = (rng.random(rows) < 1 / 3)[owner[line_of]]
    of_caption = caption_ids[(caption_ends - caption_words)[owner[line_of]] + place % caption_words[owner[line_of]]]
    ids = np.where(repeats, of_caption, words(len(line_of))) + num_words * (rng.random(len(line_of)) < 0.3)
    text = pc.binary_join(_lists(vocabulary.take(ids), per_line), pa.array(rng.choice(["", " "], n, p=[0.1, 0.9])))
    text = pc.if_else(rng.random(n) < 0.5, pc.utf8_upper(text), text)
    text = pc.if_else(rng.random(n) < 0.2, pa.array(rng.choice(["", "I", "-1"], n)), text)
    regions = pa.StructArray.from_arrays(
        [
            pa.FixedSizeListArray.from_arrays(pa.array(polygons.reshape(-1)), 8),
            pa.array((0.3 + 0.7 * rng.beta(2, 2, n)).astype(np.float32)),
            pa.array(area),
            text,
            pa.array(np.where(rng.random(n) < 0.27, rng.beta(8, 1, n), rng.random(n) * 0.55).astype(np.float32)),
        ],
        fields=list(SCHEMA.field("regions").type.value_type),
    )
    text_area = pa.array(union_areas(polygons, owner, rows).astype(np.float32), mask=broken)
    error = pc.if_else(broken, "undecodable", pa.scalar(None, pa.string()))
    columns = {"caption": captions, "regions": _lists(regions, count), "text_area": text_area, "error": error}
    return pa.table(columns, schema=pa.schema([SCHEMA.field(c) for c in COLUMNS]))


def _lists(values: pa.Array, lengths: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), values)


def _boxes(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """[N, 4, 2] rectangles as wide as a line of text, slightly turned, within the picture; and their areas."""
    half = np.minimum(np.exp(rng.normal([-2.2, -3.8], [0.7, 0.6], (n, 2))), 0.45)
    corners = half[:, None] * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
    angle = rng.normal(0, 0.05, n)
    turn = np.stack([np.stack([np.cos(angle), -np.sin(angle)], 1), np.stack([np.sin(angle), np.cos(angle)], 1)], 1)
    polygons = ((corners @ turn.transpose(0, 2, 1)) + half[:, None] + rng.random((n, 1, 2)) * (1 - 2 * half[:, None])).clip(0, 1)
    polygons = polygons.astype(np.float32)
    return polygons, shapely.area(shapely.polygons(polygons.astype(np.float64))).astype(np.float32)


def plain(table: pa.Table, policy: PolicyConfig) -> list[str | None]:
    """The reference: the reason of every row, one after the other."""
    return [_reason(row, policy) for row in table.to_pylist()]


def _reason(row: dict[str, Any], policy: PolicyConfig) -> str | None:
    if row["error"] is not None:
        return row["error"]
    if not row["caption"]:
        return "no_caption"
    counting = [r for r in row["regions"] if _counts(r, policy)]
    if policy.max_regions is not None and len(counting) > policy.max_regions:
        return "too_many_regions"
    if counting and policy.max_text_area == 0:
        return "text_area"
    shapes = [shapely.Polygon(np.reshape(r["polygon"], (4, 2))) for r in counting]
    if counting and np.float32(shapely.union_all(shapes).area) > np.float32(policy.max_text_area):
        return "text_area"
    if any(_found(_words(c), [_words(r["text"]) for r in counting]) > policy.max_caption_overlap for c in row["caption"]):
        return "caption_overlap"
    return None


def _counts(region: dict[str, Any], policy: PolicyConfig) -> bool:
    ys = region["polygon"][1::2]
    return (
        region["score"] >= policy.min_score
        and region["text_score"] >= policy.min_text_score
        and sum(c.isalnum() for c in region["text"]) >= policy.min_text_chars
        and max(ys) - min(ys) >= policy.min_height_frac
    )


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _found(caption: list[str], lines: list[list[str]]) -> float:
    """Share of the words that stand in the lines."""

    def stands(word: str) -> bool:
        long = len(word) >= 4
        near = any(Levenshtein.distance(word, r) <= len(word) // 4 for line in lines for r in line)
        return near or (long and any(word in "".join(line) for line in lines))

    return sum(map(stands, caption)) / max(len(caption), 1)


def read(path: Path) -> pa.Table:
    return pq.read_table(path, columns=list(COLUMNS))


def best_s(work: Callable[[], Any], times: int) -> float:
    spent = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        spent.append(time.perf_counter() - start)
    return min(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    num_rows = parser.parse_args().rows
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    table = annotations(num_rows)
    head = table.slice(0, SLICE)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        whole, start = Path(folder, "whole.parquet"), Path(folder, "head.parquet")
        pq.write_table(table, whole)
        pq.write_table(head, start)
        ways: dict[str, tuple[Callable[[], pa.Table], Callable[[], pa.Table]]] = {
            "in memory": (lambda: table, lambda: head),
            "from Parquet": (lambda: read(whole), lambda: read(start)),
        }
        for name in choices("policy"):
            policy = compose_config("filter", ["annotations=a", "output=o", f"policy={name}"]).policy
            verdict = judge(table, policy)
            assert verdict["reason"].slice(0, SLICE).to_pylist() == plain(head, policy), f"{name}: the reference decides otherwise"
            print(f"{name} keeps {np.mean(verdict['keep'].to_numpy()):.1%}, and the reference of its rows the same")
            for way, (all_rows, some_rows) in ways.items():
                ours_s = best_s(lambda policy=policy, rows=all_rows: judge(rows(), policy), times=3)
                plain_s = best_s(lambda policy=policy, rows=some_rows: plain(rows(), policy), times=1)
                rows.append(
                    rate(
                        f"{name}, {way}", ours=num_rows / ours_s, reference=len(head) / plain_s, unit="rows/s, one core", goal=GOAL
                    )
                )
    finish(rows)


if __name__ == "__main__":
    main()
