"""Processes die, the run ends all the same: every step is done once, with the losses of the run that was never killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
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
