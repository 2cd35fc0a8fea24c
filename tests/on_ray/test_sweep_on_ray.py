"""A sweep, real: its trials, what they share, what becomes of those that fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import noise_jpeg, sample, write_tar

from raysys.storage import read_json
from raysys.sweeping.on_ray import _tune
from raysys.sweeping.plan import Job

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]
RECIPE = ["train.precision=fp32", "train.log_every=1", "global_batch=26", "optim.warmup_steps=2", "augment=strong", "train.steps=3"]


def words(tmp_path: Path, corpus: Path, model: str, space: str) -> list[str]:
    """A sweep into W, with annotations A, that asks for retrieval among six pictures."""
    (tmp_path / "space.yaml").write_text(space)
    test = write_tar(tmp_path / "test.tar", [m for i in range(6) for m in sample(str(i), noise_jpeg(i), f"caption {i}")])
    return [
        "sweep", f"space={tmp_path / 'space.yaml'}", f"corpus.path={corpus}", f"annotations={tmp_path / 'A'}", f"model={model}", *RECIPE,
        "evaluators=[retrieval]", f"retrieval.path={test}", f"service.cache_dir={tmp_path / 'cache'}", f"output={tmp_path / 'W'}",
    ]  # fmt: skip


def test_sweep_finds_a_point_that_train_accepts_and_a_failed_one_is_a_row(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, small_corpus: Path, tiny_model: str
) -> None:
    """24 of the 30 samples have no text and a picture: too few for a batch of 26."""
    assert run_cli("annotate", f"corpus.path={small_corpus}", f"output={tmp_path / 'A'}")[0] == 0
    sweep = words(tmp_path, small_corpus, tiny_model, "policy: [paper, none]\n")
    status, printed, err = run_cli(*sweep, "dry_run=true", "measure_steps=0")
    assert status == 0, err
    assert "2 trials, 2 at a time on 2 CPUs: 6 steps, 156 samples" in printed
    assert "policy=paper: 24 of 30 samples are kept: global_batch=26 takes 26 samples of 24" in printed
    assert "policy=none: keeps 28 of 30 samples (93.3%), seen 2.8 times" in printed
    assert not (tmp_path / "W").exists()

    status, printed, err = run_cli(*sweep, "measure_steps=0")
    assert status == 0, err
    table = pq.read_table(tmp_path / "W" / "results.parquet").to_pylist()
    assert [(r["status"], r["policy"], r["kept_share"], r["steps"]) for r in table] == [
        ("failed", "paper", 24 / 30, None),
        ("finished", "none", 28 / 30, 3),
    ]
    assert "24 of 30 samples are kept: global_batch=26 takes 26 samples of 24" in table[0]["reason"]
    assert [point["point"] for point in read_json(str(tmp_path / "W" / "front.json"))] == [1]
    assert len(list((tmp_path / "W" / "evidence").glob("*/selection/manifest.json"))) == 2
    manifest = read_json(str(tmp_path / "W" / "manifest.json"))
    assert manifest["decoded"] == {"retrieval": 6} and manifest["ocr_engines_opened"] == 0 and manifest["best"] == 1
    assert manifest["counts"] == {"points": 2, "trials": 2, "finished": 1, "failed": 1, "stopped": 0}

    # another seed: the same words go on, both points keep what they have
    ended = {p: p.stat().st_mtime_ns for p in (tmp_path / "W" / "trials").glob("*/result.json")}
    status, printed, err = run_cli(*sweep, "seeds=2", "measure_steps=2")
    assert status == 0, err
    assert "2 trials (2 of 4 have ended already)" in printed and "by 1 trials that have ended" in printed
    assert {p: p.stat().st_mtime_ns for p in ended} == ended
    table = pq.read_table(tmp_path / "W" / "results.parquet").to_pylist()
    assert [(r["policy"], r["seed"], r["status"]) for r in table] == [
        ("paper", 0, "failed"), ("paper", 1, "failed"), ("none", 0, "finished"), ("none", 1, "finished"),
    ]  # fmt: skip
    assert read_json(str(tmp_path / "W" / "manifest.json"))["decoded"] == {"retrieval": 6}  # in both calls together
    assert "nothing is left to do" in run_cli(*sweep, "seeds=2")[1]

    status, printed, err = run_cli("train", f"config={tmp_path / 'W'}/best.yaml", f"output={tmp_path / 'R'}")
    assert status == 0, err
    assert "3 steps of 26" in printed
    again = read_json(str(tmp_path / "R" / "manifest.json"))["validation"]["retrieval/mean_recall@1"]
    assert again == next(r for r in table if r["policy"] == "none")["retrieval/mean_recall@1"]  # the same run
    assert run_cli("report", str(tmp_path / "W"))[0] == 0


def test_more_trials_at_a_time_than_there_is_room_for_are_refused_with_both_numbers(
    ray_cluster: None, run_cli: Cli, tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    sweep = [
        w for w in words(tmp_path, plain_corpus, tiny_model, "optim.lr: [0.001, 0.002, 0.003, 0.004]\n") if "annotations" not in w
    ]
    status, _, err = run_cli(*sweep, "max_concurrent=3")
    assert status == 2
    assert "max_concurrent=3 trials of 1 workers beside 1 evaluators needs 2.8 CPUs, the cluster has 2" in err
    status, _, err = run_cli(*sweep, "num_workers=13", "order.lanes=65")
    assert status == 2 and "a trial of 13 workers beside 1 evaluators needs 11.8 CPUs, the cluster has 2" in err
    assert not (tmp_path / "W").exists()


def test_a_trial_that_raises_is_a_crash_with_its_reason_and_the_others_go_on(ray_cluster: None, tmp_path: Path) -> None:
    jobs = iter([Job("first", None, ""), Job("second", None, ""), Job("third", None, "")])  # type: ignore[arg-type]
    results: dict[str, Any] = {}
    _tune(
        lambda: next(jobs, None), results.__setitem__, pool=None, concurrent=2, place=str(tmp_path / "_ray"), objective="mean", asha=None
    )  # fmt: skip
    assert set(results) == {"first", "second", "third"}
    for result in results.values():
        assert result == {"status": "crashed", "reason": "AttributeError: 'NoneType' object has no attribute 'output'"}
