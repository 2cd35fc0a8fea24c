"""Processes die, the run ends all the same (make test-long)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from conftest import start_cli, wait_for

from raysys.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.long]
STEPS = 200
RECIPE = ["num_workers=2", "global_batch=8", "optim.warmup_steps=2", "augment=strong", f"train.steps={STEPS}"]
RECIPE += ["train.precision=fp32", "train.log_every=1", "train.checkpoint_every=40"]


def losses(run: Path) -> list[float]:
    lines = read_metrics(str(run))
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    return [line["loss"] for line in lines]


def finish(words: list[str]) -> str:
    done = subprocess.run([sys.executable, "-m", "raysys", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_whoever_is_killed_the_losses_are_those_of_the_run_never_killed(
    tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = ["train", f"corpus.path={plain_corpus}", f"model={tiny_model}", *RECIPE]
    finish([*words, f"output={tmp_path / 'whole'}"])
    whole = losses(tmp_path / "whole")

    log = tmp_path / "driver.log"
    run = tmp_path / "driver_killed"
    process = start_cli([*words, f"output={run}"], log)
    wait_for(lambda: (run / "checkpoints" / "step-40").is_dir(), process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (run / "manifest.json").exists()
    time.sleep(5)  # the workers of a killed driver live on for some seconds
    assert "goes on after step" in finish([*words, f"output={run}"])
    assert losses(run) == pytest.approx(whole, abs=1e-4)

    log = tmp_path / "worker.log"
    run = tmp_path / "worker_killed"
    process = start_cli([*words, f"output={run}"], log)
    wait_for(lambda: (run / "checkpoints" / "step-40").is_dir(), process, log)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[0].kill()
    assert process.wait(timeout=240) == 0, log.read_text()
    assert losses(run) == pytest.approx(whole, abs=1e-4)
