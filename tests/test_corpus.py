"""Shards and their samples."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import jpeg, noise_jpeg, sample, write_tar

from raysys.config import CorpusConfig
from raysys.corpus.samples import DamagedShard
from raysys.corpus.shards import iter_samples, open_corpus
from raysys.errors import UserError


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


def test_json_that_is_damaged_does_not_hide_the_caption(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [("1.jpg", jpeg(np.zeros((8, 8, 3), np.uint8))), ("1.txt", b"good"), ("1.json", b"{")])
    assert next(iter_samples(str(path))).captions == ["good"]
    path = write_tar(tmp_path / "b.tar", [("1.json", json.dumps({"caption": "from json"}).encode())])
    assert next(iter_samples(str(path))).captions == ["from json"]
