"""The order of samples, and reading them by their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg, sample, write_tar

from raysys.corpus import tars
from raysys.corpus.index import BlockReader, SampleIndex
from raysys.corpus.order import Order, Source
from raysys.corpus.shards import iter_samples
from raysys.errors import UserError


def order(kept: list[int], global_batch: int, *, size: list[int] | None = None, **more: Any) -> Order:
    """Of shards with 1,000 bytes a sample, blocks of 7 samples, windows of 20."""
    settings: dict[str, Any] = {"lanes": 4, "block_bytes": 7000, "window_bytes": 20_000, "seed": 0, "factor": 0} | more
    size = size or [1000 * n for n in kept]
    return Order(np.array(kept), np.array(size), global_batch=global_batch, **settings)


def drawn_orders(count: int) -> list[Order]:
    """Of all sizes: fewer samples than two batches, more lanes than slots, windows smaller than a batch, shards of which nothing is kept."""
    rng = np.random.default_rng(0)
    orders = []
    while len(orders) < count:
        kept = rng.integers(0, 60, rng.integers(1, 12)).tolist()
        if sum(kept) > 1:
            orders.append(
                order(
                    kept,
                    int(rng.integers(1, sum(kept) + 1)),
                    lanes=int(rng.choice([1, 2, 3, 4, 8, 64])),
                    block_bytes=float(rng.choice([500, 3000, 1e6])),
                    window_bytes=float(rng.choice([1, 5000, 20_000, 1e9])),
                    seed=len(orders),
                )
            )
    return orders


def test_no_sample_stands_twice_in_a_batch() -> None:
    for o in drawn_orders(150):
        for step in range(min(40, 4 * o.num_samples // o.global_batch + 2)):
            samples, _ = o.batch(step)
            assert len(samples) == o.global_batch == len(set(samples.tolist()))
            assert samples.min() >= 0 and samples.max() < o.num_samples


def test_every_pass_sees_every_sample_once() -> None:
    for o in drawn_orders(150):
        if o.num_samples < 2 * o.global_batch or o.num_samples > 20 * o.global_batch:
            continue
        seen = np.zeros((o.num_samples, 400), int)
        for step in range(4 * o.num_samples // o.global_batch + 8):
            np.add.at(seen, o.batch(step), 1)
        assert seen.max() == 1, "a sample twice in a pass"
        assert (seen[:, :3] == 1).all(), "a sample left out of a pass"


def test_any_number_of_workers_shares_the_same_batches() -> None:
    for o in drawn_orders(60):
        for step in (0, 5, 17):
            whole_samples, whole_views = o.batch(step)
            for workers in (2, 3, 4):
                if workers <= min(o.num_lanes, o.global_batch):
                    parts = [o.batch(step, rank, workers) for rank in range(workers)]
                    assert np.concatenate([samples for samples, _ in parts]).tolist() == whole_samples.tolist()
                    assert np.concatenate([views for _, views in parts]).tolist() == whole_views.tolist()
                    assert tuple(len(samples) for samples, _ in parts) == o.sizes(workers)


def test_workers_whose_number_divides_the_batch_have_equal_shares() -> None:
    assert order([100, 300], 48, lanes=16).sizes(8) == (6,) * 8
    assert order([100, 300], 256, lanes=64).sizes(3) == (84, 84, 88)  # 21, 21 and 22 lanes of 4


def test_a_step_is_the_same_whatever_was_asked_before() -> None:
    a, b, other = order([50, 90], 10), order([50, 90], 10), order([50, 90], 10, seed=1)
    for step in (57, 3, 28, 0):
        assert a.batch(step)[0].tolist() == b.batch(step)[0].tolist()
    assert order([50, 90], 10).batch(28)[0].tolist() == a.batch(28)[0].tolist()
    assert a.batch(3)[0].tolist() != other.batch(3)[0].tolist()


def test_views_cycle_with_the_factor_and_0_never_repeats() -> None:
    by_factor = {k: [int(order([64], 32, factor=k).batch(step)[1][0]) for step in range(0, 8, 2)] for k in (0, 1, 2)}
    assert by_factor == {0: [0, 1, 2, 3], 1: [0, 0, 0, 0], 2: [0, 1, 0, 1]}


def test_a_lane_owns_its_samples_and_reads_neighbours() -> None:
    o = order([400, 400, 400], 16, lanes=4)
    of_lane = [set(np.concatenate([part.window(p, w) for part in o.parts(lane, 4) for p in (0, 1) for w in range(15)]).tolist()) for lane in range(4)]  # fmt: skip
    assert sorted(s for samples in of_lane for s in samples) == list(range(1200))
    part = o.parts(1, 4)[0]
    runs = np.flatnonzero(np.diff(np.sort(part.window(3, 5))) != 1)
    assert len(part.window(3, 5)) == 20 and 1 <= len(runs) <= 4  # three or four blocks of 7, some of them neighbours


def test_windows_shuffle_over_several_blocks() -> None:
    part = order([4000], 8, lanes=4, window_bytes=200_000).parts(2, 4)[0]
    first, later = part.window(0, 1), part.window(1, 1)
    assert len(first) == 200 and set(first.tolist()) != set(later.tolist())
    assert abs(np.corrcoef(np.arange(200), np.argsort(np.argsort(first)))[0, 1]) < 0.3


def test_sources_have_their_weight_in_every_batch_and_no_more() -> None:
    kept = [30, 40, 500]
    o = order(kept, 20, lanes=8, sources=[Source(0, 2, 3.0), Source(2, 3, 1.0)])
    assert o.shares == [15, 5]
    seen = np.zeros(570, int)
    for step in range(70):
        samples, _ = o.batch(step)
        assert len(set(samples.tolist())) == 20 and (samples < 70).sum() == 15
        np.add.at(seen, samples, 1)
    assert (seen[:70] >= 14).all() and (seen[:70] <= 16).all()  # 15 passes over the small source
    assert seen[70:].max() == 1  # not even one over the large


def test_weights_become_whole_samples() -> None:
    assert order([99, 99, 99], 10, sources=[Source(i, i + 1, 1.0) for i in range(3)]).shares == [4, 3, 3]


@pytest.mark.parametrize(
    ("kept", "batch", "weights", "says"),
    [
        ([10], 11, [], "global_batch=11 takes 11 samples of 10"),
        ([100, 3], 10, [1.0, 1.0], r"takes 5 samples of 3 kept ones \(source 2 of 2\)"),
        ([100, 100], 10, [1.0, 0.001], r"takes 0 samples of 100 kept ones \(source 2 of 2\)"),
    ],
)
def test_a_batch_that_cannot_be_filled_is_refused(kept: list[int], batch: int, weights: list[float], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        order(kept, batch, sources=[Source(i, i + 1, weight) for i, weight in enumerate(weights)])


# ---- reading ----------------------------------------------------------------------------------------------------------


def write_index(folder: Path, shards: dict[str, list[bytes]], keep: dict[str, list[bool]], *, row_group: int) -> SampleIndex:
    kept = []
    for name, pictures in shards.items():
        tar = write_tar(folder / "corpus" / name, [m for i, p in enumerate(pictures) for m in sample(f"{i:03d}", p, f"{name} {i}")])
        rows = [{"offset": s.offset, "size": s.size, "caption": s.captions} for s in iter_samples(str(tar))]
        for kind in ("rows", "keep"):
            (folder / kind).mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows" / f"{name}.parquet", row_group_size=row_group)
        pq.write_table(pa.table({"keep": keep[name], "reason": ["x"] * len(rows)}), folder / "keep" / f"{name}.parquet")
        kept.append(sum(keep[name]))
    names = pa.array(list(shards))
    size = np.array([(folder / "corpus" / name).stat().st_size for name in shards])
    roots = {"": str(folder / "corpus")}
    return SampleIndex(
        roots, names, np.array(kept), size, str(folder / "rows"), str(folder / "keep"), sum(map(len, shards.values()))
    )


@pytest.mark.parametrize("row_group", [3, 100])
def test_blocks_hold_the_original_bytes_of_what_is_kept(tmp_path: Path, row_group: int) -> None:
    shards = {
        name: [noise_jpeg(100 * number + i, side=16 + i) for i in range(20)] for number, name in enumerate(("a.tar", "b.tar"))
    }
    keep = {"a.tar": [i % 3 != 0 for i in range(20)], "b.tar": [i > 4 for i in range(20)]}
    index = write_index(tmp_path, shards, keep, row_group=row_group)
    expected = [(shards[n][i], f"{n} {i}") for n in shards for i in range(20) if keep[n][i]]
    assert len(index) == len(expected) == 28
    reader = BlockReader(index)
    wanted = np.array([1, 2, 3, 11, 12, 13, 14, 20, 27])
    assert reader.ranges(wanted) == [(1, 4), (11, 13), (13, 15), (20, 21), (27, 28)]  # 13 samples of a.tar are kept
    for first, end in reader.ranges(wanted):
        block = reader.read(first, end)
        got = [(bytes(p), c[0]) for p, c in zip(block.pictures, block.captions.to_pylist(), strict=True)]
        assert got == expected[first:end] and block.first == first


def test_neighbours_come_in_one_read_and_far_ones_do_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = [bytes([i]) * 30_000 for i in range(10)]
    tar = write_tar(tmp_path / "a.tar", [m for i, p in enumerate(pictures) for m in sample(str(i), p)])
    samples = list(iter_samples(str(tar)))
    offset, size = np.array([s.offset for s in samples]), np.array([s.size for s in samples])
    everything, bytes_read = tars.read_images(str(tar), offset, size)
    assert [bytes(p) for p in everything] == pictures
    assert bytes_read == offset[9] + size[9] - offset[0]  # one read
    some = np.array([7, 0, 1])  # far: 5 samples of 31,536 bytes lie between
    far, bytes_read = tars.read_images(str(tar), offset[some], size[some])
    assert [bytes(p) for p in far] == [pictures[7], pictures[0], pictures[1]]
    assert bytes_read == size[7] + offset[1] + size[1] - offset[0]
    near = np.array([4, 6])  # one sample between
    assert tars.read_images(str(tar), offset[near], size[near])[1] == offset[6] + size[6] - offset[4]


def test_a_shard_that_became_shorter_is_named(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", sample("0", b"x" * 1000))
    with pytest.raises(UserError, match=r"a\.tar: ends at byte"):
        tars.read_images(str(tar), np.array([512]), np.array([10_000_000]))


def test_rows_that_do_not_fit_the_index_are_refused(tmp_path: Path) -> None:
    index = write_index(tmp_path, {"a.tar": [noise_jpeg(1), noise_jpeg(2)]}, {"a.tar": [True, False]}, row_group=10)
    pq.write_table(pa.table({"keep": [True, True]}), tmp_path / "keep" / "a.tar.parquet")
    with pytest.raises(UserError, match=r"a\.tar\.parquet: changed since the run began"):
        BlockReader(index).read(0, 1)
