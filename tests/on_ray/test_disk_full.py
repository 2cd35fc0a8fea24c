"""The disk is full: one line and status 1, nothing that looks finished; with room again the same words finish."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raysys.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.long]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def grow(disk: Path, size: str) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", disk], check=True)


def call(*words: str) -> tuple[int, str]:
    done = subprocess.run([sys.executable, "-m", "raysys", *words], capture_output=True, text=True, check=False, timeout=300)
    return done.returncode, done.stderr


def test_annotate(small_disk: Path, small_corpus: Path) -> None:
    words = ["annotate", f"corpus.path={small_corpus}", f"output={small_disk / 'A'}", "ocr=fast", "ray.num_cpus=1"]
    (small_disk / "ballast").write_bytes(bytes(56 << 10))  # two pages are left: settings.json, and half a shard
    status, said = call(*words)
    assert status == 1 and "Traceback" not in said, said
    assert "no space left on the device of" in said.splitlines()[-1] and "make room" in said.splitlines()[-1]
    assert not (small_disk / "A" / "manifest.json").exists()
    grow(small_disk, "10m")
    status, said = call(*words)
    assert status == 0, said
    tables = [pq.read_table(file) for file in sorted((small_disk / "A" / "shards").iterdir())]
    assert [table.num_rows for table in tables] == [15, 15]
    assert not list((small_disk / "A").rglob(".tmp-*"))


def test_train(small_disk: Path, plain_corpus: Path, tiny_model: str) -> None:
    grow(small_disk, "8m")  # room for the log, not for a checkpoint
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", f"output={small_disk / 'R'}", "num_workers=2"]
    words += ["global_batch=8", "train.steps=20", "train.checkpoint_every=10", "train.log_every=1", "optim.warmup_steps=2"]
    status, said = call(*words)
    assert status == 1 and "Traceback" not in said, said
    assert "no space left on the device of" in said.splitlines()[-1] and "step-10/state.pt" in said.splitlines()[-1]
    grow(small_disk, "200m")
    status, said = call(*words)
    assert status == 0, said
    assert [line["step"] for line in read_metrics(str(small_disk / "R"))] == list(range(1, 21))
