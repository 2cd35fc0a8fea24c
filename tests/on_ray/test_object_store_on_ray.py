"""Corpus and outputs on S3: the command in a process of its own, on a Ray of its own, killed half-way and run again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import S3Server, noise_jpeg, sample, start_cli, text_jpeg, wait_for, write_tar

from raysys.corpus.shards import iter_samples
from raysys.regions.annotations import read_parquet
from raysys.storage import exists, find_files, join, list_names, open_fs, read_json

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]
SHARDS, SAMPLES = 5, 24


def rows(folder: str) -> pa.Table:
    root, files = find_files(folder, (".parquet",))
    return pa.concat_tables([read_parquet(join(root, file.path)).replace_schema_metadata() for file in files])


def test_annotate_killed_half_way_then_filter_as_from_a_folder(
    s3: S3Server, ray_cluster: None, run_cli: Cli, tmp_path: Path
) -> None:
    """The Ray of the other tests, which may not know the server, looks at the local copy."""

    def raysys(*words: str) -> str:
        status, printed, err = run_cli(*words)
        assert status == 0, err
        return printed

    bucket, local = s3.new_bucket(), tmp_path / "c"
    for shard in range(SHARDS):
        pictures = [text_jpeg(f"NUMBER {i}") if i % 2 else noise_jpeg(i, 224) for i in range(SAMPLES)]
        write_tar(local / "d" / f"{shard}.tar", [m for i, p in enumerate(pictures) for m in sample(f"{shard}-{i}", p)])
    fs, inner = open_fs(bucket)
    fs.put(str(local), f"{inner}/c", recursive=True)

    words = ["annotate", f"corpus.path={bucket}/c/d/{{0..{SHARDS - 1}}}.tar", f"output={bucket}/A"]
    log = tmp_path / "log"
    process = start_cli(words, log)
    wait_for(lambda: list_names(f"{bucket}/A/shards"), process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not exists(f"{bucket}/A/manifest.json") and len(list_names(f"{bucket}/A/shards")) < SHARDS
    again = subprocess.run([sys.executable, "-m", "raysys", *words], capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert f"of {SHARDS} shards are done already" in again.stdout
    assert sorted(list_names(f"{bucket}/A")) == ["manifest.json", "settings.json", "shards", "tensorboard"]

    raysys("annotate", f"corpus.path={local}/d", f"output={tmp_path / 'A'}")
    annotated = rows(f"{bucket}/A/shards")
    assert annotated.num_rows == len(set(annotated["key"].to_pylist())) == SHARDS * SAMPLES
    assert annotated.equals(rows(str(tmp_path / "A" / "shards")))
    assert "nothing is left to do" in raysys(*words)

    raysys("filter", f"annotations={bucket}/A", f"output={bucket}/S", f"shards={bucket}/F")
    raysys("filter", f"annotations={tmp_path / 'A'}", f"output={tmp_path / 'S'}", f"shards={tmp_path / 'F'}")
    assert rows(f"{bucket}/S/selection").equals(rows(str(tmp_path / "S" / "selection")))
    counts = read_json(f"{bucket}/S/manifest.json")["counts"]
    assert counts == read_json(str(tmp_path / "S" / "manifest.json"))["counts"] and 0 < counts["kept"] < counts["samples"]
    there = find_files(f"{bucket}/F", (".tar", ".json"))[1]
    assert [f.path for f in there] == [f.path for f in find_files(str(tmp_path / "F"), (".tar", ".json"))[1]]
    tars = [file.path for file in there if file.path.endswith(".tar")]
    assert len(tars) == SHARDS
    kept = [s.key for tar in tars for s in iter_samples(f"{bucket}/F/{tar}")]
    assert kept == [s.key for tar in tars for s in iter_samples(str(tmp_path / "F" / tar))] and len(kept) == counts["kept"]
