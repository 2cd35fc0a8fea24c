"""Shards, order."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg, noise_jpeg, sample, write_tar

from raysys.config import CorpusConfig
from raysys.corpus.index import PictureReader, ShardRows, build_index
from raysys.corpus.order import Order
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import iter_samples, open_corpus
from raysys.storage import UserError


def test_samples_their_places_and_captions(tmp_path: Path) -> None:
    first, second = noise_jpeg(1), noise_jpeg(2)
    path = write_tar(
        tmp_path / "a.tar",
        sample("x/1", first, "one", ["uno", "eins"])
        + sample("x/2", second, "two")
        + sample("3", None, "no picture")
        + [("4.webp", second)],
    )
    samples = list(iter_samples(str(path)))
    assert [s.key for s in samples] == ["x/1", "x/2", "3", "4"]
    assert [s.index for s in samples] == [0, 1, 2, 3]
    assert [s.captions for s in samples] == [["uno", "eins"], ["two"], ["no picture"], []]
    raw = path.read_bytes()
    assert raw[samples[0].offset : samples[0].offset + samples[0].size] == first == samples[0].image
    assert (samples[2].offset, samples[2].size, samples[2].image) == (-1, -1, None)


def test_a_truncated_shard_gives_its_good_part(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [m for i in range(5) for m in sample(str(i), noise_jpeg(i))])
    path.write_bytes(path.read_bytes()[:4000])
    seen = []
    with pytest.raises(DamagedShard):
        seen.extend(iter_samples(str(path)))
    found = []
    try:
        for s in iter_samples(str(path)):
            found.append(s.key)
    except DamagedShard:
        pass
    assert found and found == [str(i) for i in range(len(found))]


def test_what_is_no_tar_is_damaged(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"x" * 2000)
    with pytest.raises(DamagedShard):
        list(iter_samples(str(tmp_path / "a.tar")))


def test_compressed_tars_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").touch()
    with pytest.raises(UserError, match="uncompressed"):
        open_corpus(CorpusConfig(f"{tmp_path}/*.tar.gz"))


def test_index_reads_the_original_bytes(tmp_path: Path) -> None:
    import pyarrow as pa

    pictures = [noise_jpeg(i) for i in range(3)]
    path = write_tar(tmp_path / "a.tar", [m for i, p in enumerate(pictures) for m in sample(str(i), p, f"caption {i}")])
    samples = list(iter_samples(str(path)))
    rows = ShardRows(
        str(path),
        np.array([s.offset for s in samples]),
        np.array([s.size for s in samples]),
        pa.array([s.captions for s in samples]),
        np.array([True, False, True]),
    )
    index = build_index([rows])
    assert len(index) == 2 and index.num_samples_before == 3
    assert [PictureReader(index).read(i) for i in range(2)] == [pictures[0], pictures[2]]
    assert index.captions_of(1) == ["caption 2"]


@pytest.mark.parametrize(("n", "b"), [(100, 32), (64, 32), (65, 32), (1000, 7), (33, 32), (96, 32)])
def test_no_sample_twice_in_a_batch(n: int, b: int) -> None:
    order = Order(n, b, seed=3, factor=0)
    for step in range(3 * n // b + 2):
        samples, _ = order.batch(step)
        assert len(set(samples.tolist())) == b


@pytest.mark.parametrize(("n", "b"), [(100, 32), (65, 32), (1000, 7), (96, 32)])
def test_every_pass_sees_every_sample_once(n: int, b: int) -> None:
    order = Order(n, b, seed=1, factor=0)
    stream = np.concatenate([order.batch(step)[0] for step in range(5 * n // b)])
    for p in range(4):
        assert sorted(stream[p * n : (p + 1) * n].tolist()) == list(range(n))


def test_views_cycle_with_the_factor_and_0_never_repeats() -> None:
    by_factor = {k: [int(Order(64, 32, 0, k).batch(step)[1][0]) for step in range(0, 8, 2)] for k in (0, 1, 2)}
    assert by_factor == {0: [0, 1, 2, 3], 1: [0, 0, 0, 0], 2: [0, 1, 0, 1]}


def test_order_is_a_function_of_seed_and_step() -> None:
    a, b, c = Order(100, 10, 0, 1), Order(100, 10, 0, 1), Order(100, 10, 1, 1)
    for step in (57, 3, 0):
        assert (a.batch(step)[0] == b.batch(step)[0]).all()
    assert (a.batch(3)[0] != c.batch(3)[0]).any()


def test_a_batch_larger_than_the_corpus_is_refused() -> None:
    with pytest.raises(ValueError, match="global_batch=11 is larger than the 10 samples"):
        Order(10, 11, 0, 1)


def test_json_that_is_damaged_does_not_hide_the_caption(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(np.zeros((8, 8, 3), np.uint8))), ("1.txt", b"good"), ("1.json", b"{")])
    assert next(iter_samples(str(path))).captions == ["good"]
    path = write_tar(tmp_path / "b.tar", [("1.json", json.dumps({"caption": "from json"}).encode())])
    assert next(iter_samples(str(path))).captions == ["from json"]
