"""Processes and nodes die, the run ends all the same: every step is done once, with the losses of the run that was never killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import start_cli, wait_for

from raysys.training import checkpoint
from raysys.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.long]
STEPS = 200
RECIPE = ["global_batch=8", "optim.warmup_steps=2", "augment=strong", "train.precision=fp32", "train.log_every=1"]
SHORT = [*RECIPE, f"train.steps={STEPS}", "train.checkpoint_every=40"]
LONG = [*RECIPE, "train.steps=1500", "train.checkpoint_every=20"]


def losses(run: Path, steps: int = STEPS) -> list[float]:
    """Of the log as it stands in the file: each step once."""
    assert [line["step"] for line in read_metrics(str(run))] == list(range(1, steps + 1))
    assert len((run / "metrics.jsonl").read_text().splitlines()) == steps
    return [line["loss"] for line in read_metrics(str(run))]


def finish(words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "raysys", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def workers_of(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    return [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]


def step_of(run: Path) -> int:
    lines = read_metrics(str(run))
    return int(lines[-1]["step"]) if lines else 0


def test_killed_at_any_step_one_worker_gives_the_losses_of_the_run_never_killed_to_the_last_digit(
    tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", *SHORT]
    finish([*words, f"output={tmp_path / 'whole'}"])
    run, log = tmp_path / "killed", tmp_path / "log"
    for at in (17, 93, 160):  # before the first checkpoint, between two, and of what was resumed twice
        process = start_cli([*words, f"output={run}"], log)
        wait_for(lambda at=at: step_of(run) > at, process, log)  # type: ignore[misc]
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert not (run / "manifest.json").exists()
        # At once: the workers of a killed driver live on for some seconds, and must not write into the run any more.
    printed = finish([*words, f"output={run}"])
    assert re.search(r"goes on after step (160|120)", printed), printed
    assert losses(run) == losses(tmp_path / "whole")
    assert not (run / "lock").exists()


def test_whoever_is_killed_the_losses_are_those_of_the_run_never_killed(
    tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", "num_workers=2", *SHORT]
    finish([*words, f"output={tmp_path / 'whole'}"])
    whole = losses(tmp_path / "whole")

    log = tmp_path / "worker.log"
    run = tmp_path / "worker_killed"
    process = start_cli([*words, f"output={run}"], log)
    for step in (40, 120):
        wait_for(lambda step=step: step in checkpoint.steps_there(str(run)), process, log)  # type: ignore[misc]
        workers = workers_of(process)
        assert len(workers) == 2
        workers[step % 3 % 2].kill()
        wait_for(lambda dead=workers: not any(p.is_running() for p in dead), process, log)  # type: ignore[misc]
    assert process.wait(timeout=240) == 0, log.read_text()
    assert losses(run) == pytest.approx(whole, abs=1e-4)


def test_one_two_and_four_workers_have_the_same_losses(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", *RECIPE, "train.steps=20", "ray.num_cpus=4"]
    seen = []
    for workers in (1, 2, 4):
        finish([*words, f"num_workers={workers}", f"output={tmp_path / str(workers)}"])
        lines = read_metrics(str(tmp_path / str(workers)))
        assert len(lines) == 20 and {line["num_workers"] for line in lines} == {workers}
        seen.append([line["loss"] for line in lines])
    assert seen[1] == pytest.approx(seen[0], abs=1e-4) and seen[2] == pytest.approx(seen[0], abs=1e-4)


def test_a_call_that_takes_a_run_over_ends_the_one_before(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    """The same words twice at the same time: the newer call has the run, the older one says so and ends with status 2."""
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", *LONG, f"output={tmp_path / 'R'}"]
    older_log, newer_log = tmp_path / "older", tmp_path / "newer"
    older = start_cli([*words, "ray.num_cpus=1"], older_log)
    wait_for(lambda: step_of(tmp_path / "R") > 5, older, older_log)
    newer = start_cli([*words, "ray.num_cpus=1"], newer_log)
    assert older.wait(timeout=240) == 2, older_log.read_text()
    assert "has taken over" in older_log.read_text().splitlines()[-1]
    assert newer.wait(timeout=240) == 0, newer_log.read_text()
    losses(tmp_path / "R", 1500)


def test_workers_come_and_go_and_the_losses_stay(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    """num_workers=[1,3]: two at first, a node with a third comes, then another dies. The global batch stays; 3 do not divide it."""
    from ray.cluster_utils import Cluster

    words = [
        "train",
        f"corpus.path={plain_corpus}",
        f"model={tiny_model}",
        *RECIPE,
        "train.steps=20000",
        "train.checkpoint_every=20",
    ]
    run, whole, log = tmp_path / "R", tmp_path / "whole", tmp_path / "log"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "object_store_memory": 200 << 20})
    try:
        nodes = [cluster.add_node(num_cpus=1, object_store_memory=200 << 20) for _ in range(2)]
        process = start_cli([*words, "num_workers=[1,3]", f"output={run}"], log, RAY_ADDRESS=cluster.address)
        wait_for(lambda: step_of(run) > 30, process, log)
        assert sizes_seen(run) == {2}
        cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
        with_three = lambda: sum(line["num_workers"] == 3 for line in read_metrics(str(run)))  # noqa: E731
        wait_for(lambda: with_three() > 45, process, log)  # more than a checkpoint, so that some of them stay
        cluster.remove_node(nodes[0], allow_graceful=False)
        started = time.monotonic()
        wait_for(lambda: read_metrics(str(run))[-1]["num_workers"] == 2, process, log)
        print(f"went on {time.monotonic() - started:.0f} s after the node died")
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    finally:
        cluster.shutdown()
    lines = read_metrics(str(run))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1)) and sizes_seen(run) == {2, 3}

    process = start_cli([*words, f"output={whole}"], log)
    wait_for(lambda: step_of(whole) > len(lines), process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    far = max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, read_metrics(str(whole)), strict=False))
    print(f"losses over {len(lines)} steps are at most {far:.1e} apart")
    assert far < 1e-2


def sizes_seen(run: Path) -> set[int]:
    return {int(line["num_workers"]) for line in read_metrics(str(run))}
