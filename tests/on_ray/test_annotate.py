"""``raysys annotate`` on real Ray processes: exactly once whatever dies, one huge tar, what changes, what is odd."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pyarrow.dataset as ds
import pytest
from conftest import Members, hanging_jpeg, jpeg, noise_jpeg, sample, start_cli, text_jpeg, wait_for, write_tar
from oddities import odd_corpus
from PIL import Image

from raysys.storage import read_json

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]


def keys(annotations: Path) -> list[tuple[str, str]]:
    table = ds.dataset(annotations / "shards", format="parquet").to_table(["shard", "key"])
    return sorted(zip(table["shard"].to_pylist(), table["key"].to_pylist(), strict=True))


def shown(number: int) -> bytes:
    return text_jpeg(f"NUMBER {number}") if number % 5 == 0 else noise_jpeg(number, 96)


def mixed_corpus(folder: Path, num_pictures: int) -> list[tuple[str, str]]:
    """Half of the pictures in one tar, half in twenty; returns shard and key of each."""
    expected = []
    for shard, first, end in [
        ("large.tar", 0, num_pictures // 2),
        *((f"small/{i:02d}.tar", num_pictures * (20 + i) // 40, num_pictures * (21 + i) // 40) for i in range(20)),
    ]:
        members: Members = []
        for number in range(first, end):
            members += sample(f"{number:06d}", shown(number), f"picture {number}")
            expected.append((shard.replace("/", "%2F"), f"{number:06d}"))
        write_tar(folder / shard, members)
    return sorted(expected)


@pytest.mark.long  # make test kills once, over an object store
@pytest.mark.parametrize(
    ("num_pictures", "num_kills"),
    [pytest.param(1200, 3, id="short"), pytest.param(10_000, 20, id="long")],
)
def test_whatever_is_killed_every_key_is_there_once(tmp_path: Path, num_pictures: int, num_kills: int) -> None:
    """SIGKILL of drivers and of OCR actors, at random moments, then the same words."""
    expected = mixed_corpus(tmp_path / "c", num_pictures)
    # units so small that the large tar of these small pictures is cut
    words = [
        "annotate",
        f"corpus.path={tmp_path / 'c'}",
        f"output={tmp_path / 'A'}",
        "ocr=fast",
        "ocr.unit_mb=.1",
        "ray.num_cpus=2",
    ]
    luck = random.Random(num_kills)
    killed = {"driver": 0, "actor": 0}
    log = tmp_path / "log"
    process = start_cli(words, log)
    while sum(killed.values()) < num_kills:
        wait_for(partial(actors_of, process), process, log)
        time.sleep(luck.uniform(0.5, 4.0))
        if process.poll() is not None:
            break
        victim = luck.choice(["driver", "actor"])
        if victim == "driver":
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        elif actors := actors_of(process):
            luck.choice(actors).kill()
        else:
            continue
        killed[victim] += 1
        check_what_is_there(tmp_path / "A", expected)
        if victim == "driver":
            process = start_cli(words, log)
    assert process.wait(timeout=600) == 0, log.read_text()
    assert sum(killed.values()) == num_kills, f"the work was done after {killed}"
    assert keys(tmp_path / "A") == expected
    assert sorted(p.name for p in (tmp_path / "A").iterdir()) == ["manifest.json", "settings.json", "shards", "tensorboard"]
    assert read_json(str(tmp_path / "A" / "manifest.json"))["counts"]["samples"] == num_pictures


def actors_of(process: psutil.Popen) -> list[psutil.Process]:
    """OCR actors of a driver: those whose process bears the name of the pool's worker."""
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        try:
            if "UnitAnnotator" in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def check_what_is_there(annotations: Path, expected: list[tuple[str, str]]) -> None:
    """At any moment: only whole files, each of its whole shard, readable by anyone."""
    shards = annotations / "shards"
    if not shards.is_dir():
        return
    names = sorted(p.name for p in shards.iterdir())
    assert all(name.endswith(".parquet") for name in names)
    done = {name.removesuffix(".parquet") for name in names}
    there = [row for row in keys(annotations) if row[0] in done]  # more may have come since they were listed
    assert there == [row for row in expected if row[0] in done]


def test_odd_samples_are_counted_by_reason_and_the_good_ones_are_there(ray_cluster: None, run_cli: Cli, tmp_path: Path) -> None:
    expected = odd_corpus(tmp_path / "c" / "odd.tar")
    write_tar(tmp_path / "c" / "slow.tar", [*sample("slow", hanging_jpeg()), *sample("after", noise_jpeg(1))])
    words = ("annotate", f"corpus.path={tmp_path / 'c'}", f"output={tmp_path / 'A'}", "ocr.decode_timeout_s=3")
    status, printed, err = run_cli(*words)
    assert status == 0, err
    reasons = [r for r in expected.values() if r] + ["duplicate_key", "timeout"]
    assert read_json(str(tmp_path / "A" / "manifest.json"))["counts"]["errors"] == {
        r: reasons.count(r) for r in sorted(set(reasons))
    }
    for reason in reasons:
        assert f"annotate: 1 samples with an error: {reason}" in printed
    assert "annotate: 1 samples without a caption" in printed
    assert len(keys(tmp_path / "A")) == len(expected) + 3


def test_waves_units_and_parts_give_what_one_shard_at_a_time_gives(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = mixed_corpus(tmp_path / "c", 400)
    monkeypatch.setattr("raysys.regions.on_ray.WAVE", 10)
    monkeypatch.setattr("raysys.regions.units.SMALLEST_UNIT_BYTES", 20_000)
    words = ("annotate", f"corpus.path={tmp_path / 'c'}", "ocr=fast")
    assert run_cli(*words, f"output={tmp_path / 'A'}")[0] == 0
    assert keys(tmp_path / "A") == expected
    monkeypatch.setattr("raysys.regions.units.SMALLEST_UNIT_BYTES", 1 << 30)
    assert run_cli(*words, f"output={tmp_path / 'B'}")[0] == 0
    tables = [ds.dataset(tmp_path / name / "shards", format="parquet").to_table().sort_by([("shard", "ascending"), ("index", "ascending")]) for name in "AB"]  # fmt: skip
    assert tables[0].equals(tables[1])


def test_a_shard_that_changed_is_looked_at_again_and_a_corpus_that_moved_is_not(
    ray_cluster: None, run_cli: Cli, tmp_path: Path
) -> None:
    for name in "ab":
        write_tar(tmp_path / "c" / f"{name}.tar", [m for i in range(3) for m in sample(f"{name}{i}", noise_jpeg(i))])
    words = ("annotate", f"output={tmp_path / 'A'}", "ocr=fast")
    assert run_cli(*words, f"corpus.path={tmp_path / 'c'}")[0] == 0
    before = (tmp_path / "A" / "shards" / "a.tar.parquet").stat().st_mtime_ns

    (tmp_path / "c").rename(tmp_path / "moved")
    status, printed, _ = run_cli(*words, f"corpus.path={tmp_path / 'moved'}")
    assert status == 0 and "nothing is left to do" in printed
    words_of_filter = ("filter", f"annotations={tmp_path / 'A'}", f"output={tmp_path / 'S'}", f"shards={tmp_path / 'F'}")
    status, printed, err = run_cli(*words_of_filter)
    assert status == 0 and f"{tmp_path / 'F'}" in printed, err  # looks for the corpus where it lies now

    write_tar(tmp_path / "moved" / "b.tar", [m for i in range(5) for m in sample(f"b{i}", noise_jpeg(i))])
    status, printed, _ = run_cli(*words, f"corpus.path={tmp_path / 'moved'}")
    assert status == 0 and "1 shards changed since they were annotated and are looked at again, b.tar first" in printed
    assert len(keys(tmp_path / "A")) == 8
    assert (tmp_path / "A" / "shards" / "a.tar.parquet").stat().st_mtime_ns == before
    assert read_json(str(tmp_path / "A" / "manifest.json"))["counts"]["samples"] == 8

    (tmp_path / "moved" / "b.tar").unlink()  # as filter's message says
    (tmp_path / "A" / "shards" / "b.tar.parquet").unlink()
    assert run_cli(*words, f"corpus.path={tmp_path / 'moved'}")[0] == 0
    assert read_json(str(tmp_path / "A" / "manifest.json"))["counts"]["samples"] == 3


def test_annotations_of_another_corpus_are_not_added_to(ray_cluster: None, run_cli: Cli, tmp_path: Path) -> None:
    for folder, name in (("c", "a"), ("names", "b"), ("same", "a")):
        write_tar(tmp_path / folder / f"{name}.tar", [m for i in range(3) for m in sample(f"{folder}{i}", noise_jpeg(i))])
    words = ("annotate", f"output={tmp_path / 'A'}", "ocr=fast")
    assert run_cli(*words, f"corpus.path={tmp_path / 'c'}")[0] == 0
    for other in ("names", "same"):
        status, _, err = run_cli(*words, f"corpus.path={tmp_path / other}")
        assert status == 2 and "was made of another corpus" in err and "0 of its 1 shards are in this one" in err
    assert [key for _, key in keys(tmp_path / "A")] == ["c0", "c1", "c2"]
    assert run_cli(*words, f"corpus.path={tmp_path / 'c'}")[0] == 0


def test_a_shard_that_cannot_be_read_is_named_at_the_end_and_the_rest_is_done(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        write_tar(tmp_path / "c" / f"{name}.tar", [m for i in range(3) for m in sample(f"{name}{i}", noise_jpeg(i))])
    from raysys.regions import on_ray

    def list_then_lose(*given: object) -> object:
        found = original(*given)  # type: ignore[arg-type]
        (tmp_path / "c" / "a.tar").unlink()
        return found

    original = on_ray.shards_to_do
    monkeypatch.setattr(on_ray, "shards_to_do", list_then_lose)
    status, _, err = run_cli("annotate", f"corpus.path={tmp_path / 'c'}", f"output={tmp_path / 'A'}", "ocr=fast")
    says = "1 of 2 shards could not be read, the others are annotated and the same words try these again; a.tar"
    assert status == 2 and says in err.splitlines()[-1]
    assert [key for _, key in keys(tmp_path / "A")] == ["b0", "b1", "b2"]
    assert not (tmp_path / "A" / "manifest.json").exists()


@pytest.mark.long
def test_one_tar_of_large_pictures_keeps_two_actors_busy_in_little_memory(tmp_path: Path) -> None:
    """700 photographs of 3 MB in one tar: neither actor waits for the other, and no process grows past 1.5 GB."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 256, (300, 400, 3), dtype=np.uint8)).resize((4000, 3000), Image.Resampling.BICUBIC)
    grain = rng.integers(-5, 5, (3000, 4000, 3), dtype=np.int16)
    data = jpeg(np.clip(np.asarray(photo, np.int16) + grain, 0, 255).astype(np.uint8))
    assert 2.5e6 < len(data) < 4e6
    write_tar(tmp_path / "c" / "one.tar", [m for i in range(700) for m in sample(f"{i:04d}", data + bytes([i % 256]))])
    log = tmp_path / "log"
    words = ["annotate", f"corpus.path={tmp_path / 'c'}", f"output={tmp_path / 'A'}", "ocr=fast", "ray.num_cpus=2"]
    process = start_cli(words, log)
    most: dict[str, int] = {}
    cpu_s: dict[int, list[tuple[float, float]]] = {}
    while process.poll() is None:
        try:
            for actor in actors_of(process):
                most["actor"] = max(most.get("actor", 0), actor.memory_info().rss)
                cpu_s.setdefault(actor.pid, []).append((time.monotonic(), actor.cpu_times().user))
            most["driver"] = max(most.get("driver", 0), psutil.Process(process.pid).memory_info().rss)
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.5)
    assert process.returncode == 0, log.read_text()
    assert len(keys(tmp_path / "A")) == 700
    shares = [(times[-1][1] - times[0][1]) / (times[-1][0] - times[0][0]) for times in cpu_s.values()]
    print(f"most memory, MB: { {who: size >> 20 for who, size in most.items()} }; CPUs that each actor kept busy: {shares}")
    assert max(most.values()) < 1.5e9
    assert len(shares) == 2 and min(shares) > 0.8 * max(shares)
