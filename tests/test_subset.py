"""Sorted subset files against ``np.save`` of ``np.unique``, with runs so small that many are merged."""

from __future__ import annotations

import io
import os
from pathlib import Path

import fsspec
import numpy as np
import pytest

from raysys.policy import subset
from raysys.policy.subset import UID, SortedUids


@pytest.fixture(autouse=True)
def small_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subset, "RUN_UIDS", 64)
    monkeypatch.setattr(subset, "SAMPLES_OF_RUN", 8)


def uids_of(numbers: np.ndarray) -> np.ndarray:
    """uint64 [n, 2] -> ``UID`` [n]."""
    return np.ascontiguousarray(numbers, np.uint64).view(UID)[:, 0]


def expected(uids: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, np.unique(uids))
    return file.getvalue()


def written(uids: np.ndarray, folder: Path, *, shards: int) -> bytes:
    with SortedUids(str(folder / "_tmp")) as sorted_uids:
        for of_shard in np.array_split(uids, shards):
            sorted_uids.add(of_shard)
        sorted_uids.write(str(folder / "subset.npy"), tmp_folder=str(folder / "_tmp"))
    return (folder / "subset.npy").read_bytes()


RANDOM = np.random.default_rng(0).integers(0, 1 << 64, (5_000, 2), np.uint64)
COUNTED = np.stack([np.zeros(5_000, np.uint64), np.random.default_rng(1).permutation(5_000).astype(np.uint64)], axis=1)
FEW = np.random.default_rng(2).integers(0, 20, (5_000, 2), np.uint64)
EDGES = np.array([[0, 0], [1, 0], [0, 1], [1 << 63, 0], [(1 << 64) - 1, (1 << 64) - 1], [255, 256], [256, 255]], np.uint64)


@pytest.mark.parametrize("numbers", [RANDOM, COUNTED, FEW, EDGES, RANDOM[:64], RANDOM[:1], RANDOM[:0]])
def test_the_file_is_that_of_numpy_byte_for_byte(numbers: np.ndarray, tmp_path: Path) -> None:
    uids = uids_of(numbers)
    assert written(uids, tmp_path, shards=37) == expected(uids)


def test_uids_that_several_shards_share_stand_once(tmp_path: Path) -> None:
    uids = uids_of(np.concatenate([RANDOM[:500], RANDOM[:500][::-1], RANDOM[100:700]]))
    assert written(uids, tmp_path, shards=11) == expected(uids_of(RANDOM[:700]))


@pytest.mark.parametrize("numbers", [RANDOM, COUNTED])
def test_memory_holds_about_a_run_at_a_time(numbers: np.ndarray) -> None:
    """However the uids are spread: ranges of 8 samples, which stand for 64 uids, and at most 8 more of each of the 78 runs."""
    with SortedUids(None) as sorted_uids:
        for of_shard in np.array_split(uids_of(numbers[: 78 * 64]), 78 * 8):
            sorted_uids.add(of_shard)
            assert sorted_uids._num_waiting < 64
        sizes = [len(keys) for keys in sorted_uids._merged()]
    assert sum(sizes) == 78 * 64
    assert max(sizes) <= 64 + 8 * 78


def test_nothing_is_left_beside_the_file(tmp_path: Path) -> None:
    written(uids_of(RANDOM), tmp_path, shards=3)
    assert sorted(os.listdir(tmp_path)) == ["_tmp", "subset.npy"] and os.listdir(tmp_path / "_tmp") == []


def test_an_object_store_gets_the_same_file(tmp_path: Path) -> None:
    uids = uids_of(RANDOM)
    with SortedUids(None) as sorted_uids:
        sorted_uids.add(uids)
        sorted_uids.write("memory://bucket/S/subset.npy", tmp_folder="memory://bucket/S/_tmp")
    assert fsspec.filesystem("memory").cat_file("/bucket/S/subset.npy") == expected(uids)
