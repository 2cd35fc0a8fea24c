"""A sweep whose processes die, one whose trials are stopped early, and what none of its processes ever does: look at text."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg, sample, start_cli, wait_for, write_tar

from raysys.cli import run
from raysys.storage import read_json
from raysys.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.long]
STEPS = 600
NO_OCR = """
import os, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name in ("raysys.regions.engine", "raysys.regions.annotator"):
            open(os.environ["OCR_WAS_LOADED"], "a").write(f"{name} in {sys.argv}\\n")
sys.meta_path.insert(0, Refuse())
"""


def words(tmp_path: Path, corpus: Path, model: str, space: str) -> list[str]:
    (tmp_path / "space.yaml").write_text(space)
    test = write_tar(tmp_path / "test.tar", [m for i in range(6) for m in sample(str(i), noise_jpeg(i), f"caption {i}")])
    return [
        "sweep", f"space={tmp_path / 'space.yaml'}", f"corpus.path={corpus}", f"model={model}", "global_batch=8", f"train.steps={STEPS}",
        "optim.warmup_steps=2", "train.precision=fp32", "train.log_every=1", "train.checkpoint_every=50", "measure_steps=0",
        "evaluators=[retrieval]", f"retrieval.path={test}", f"service.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'W'}",
    ]  # fmt: skip


def test_killed_in_its_third_and_fourth_trial_a_sweep_has_six_results_each_point_once_and_no_process_looks_at_text(
    tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    run(["annotate", f"corpus.path={plain_corpus}", f"output={tmp_path / 'A'}"])
    sweep = [
        *words(tmp_path, plain_corpus, tiny_model, "policy: [none, paper, parrot]\naugment.factor: [1, 0]\n"),
        f"annotations={tmp_path / 'A'}",
    ]
    (tmp_path / "no_ocr").mkdir()
    (tmp_path / "no_ocr" / "sitecustomize.py").write_text(NO_OCR)
    watched = {"PYTHONPATH": str(tmp_path / "no_ocr"), "OCR_WAS_LOADED": str(tmp_path / "loaded")}
    trials, log = tmp_path / "W" / "trials", tmp_path / "log"

    def third_and_fourth() -> bool:
        begun = [
            t
            for t in trials.glob("*")
            if (t / "checkpoints" / "step-50" / "info.json").exists() and not (t / "manifest.json").exists()
        ]
        return len(list(trials.glob("*/result.json"))) == 2 and len(begun) == 2

    process = start_cli(sweep, log, **watched)
    wait_for(third_and_fourth, process, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ended = {file: file.stat().st_mtime_ns for file in trials.glob("*/result.json")}
    assert len(ended) == 2 and not (tmp_path / "W" / "manifest.json").exists()

    process = start_cli(sweep, log, **watched)
    assert process.wait(timeout=300) == 0, log.read_text()
    assert "4 trials (2 of 6 have ended already)" in log.read_text()
    assert {file: file.stat().st_mtime_ns for file in ended} == ended
    rows = pq.read_table(tmp_path / "W" / "results.parquet").to_pylist()
    assert [(row["policy"], row["augment.factor"]) for row in rows] == [(p, f) for p in ("none", "paper", "parrot") for f in (1, 0)]
    assert {row["status"] for row in rows} == {"finished"} and all(row["score"] is not None for row in rows)
    for row in rows:  # every step was logged once: those after the kill go on where a checkpoint was
        assert [line["step"] for line in read_metrics(str(trials / row["trial"]))] == list(range(1, STEPS + 1))
        assert len((trials / row["trial"] / "metrics.jsonl").read_text().splitlines()) == STEPS + 1  # and the validation
    manifest = read_json(str(tmp_path / "W" / "manifest.json"))
    assert manifest["ocr_engines_opened"] == 0 and not (tmp_path / "loaded").exists()
    assert (
        manifest["decoded"] == {"retrieval": 0} and len(list((tmp_path / "cache").rglob("*.u8"))) == 1
    )  # by the call that was killed


def test_tpe_with_asha_ends_bad_trials_early(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    sweep = words(tmp_path, plain_corpus, tiny_model, "optim.lr: {low: 1.0e-6, high: 0.01, log: true}\n")
    sweep += [
        "search=tpe",
        "num_samples=6",
        "train.validate_every=50",
        "asha.grace_steps=50",
        "asha.reduction_factor=2",
        "max_concurrent=2",
    ]
    log = tmp_path / "log"
    process = start_cli(sweep, log)
    assert process.wait(timeout=400) == 0, log.read_text()
    rows = pq.read_table(tmp_path / "W" / "results.parquet").to_pylist()
    assert [row["point"] for row in rows] == list(range(6)) and len({row["optim.lr"] for row in rows}) == 6
    assert {row["status"] for row in rows} == {"finished", "stopped"}
    for row in rows:
        assert row["steps"] == STEPS if row["status"] == "finished" else 50 <= row["steps"] < STEPS
    best = next(row for row in rows if row["point"] == read_json(str(tmp_path / "W" / "manifest.json"))["best"])
    assert best["status"] == "finished"
