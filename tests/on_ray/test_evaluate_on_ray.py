"""The pool of evaluators on real Ray: shares, deaths, several models, and what is written."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from conftest import noise_jpeg, sample, write_tar

from raysys.config import RetrievalSetConfig, ServiceConfig
from raysys.evaluation.on_ray import EvaluatorPool, Spec, Trained
from raysys.models import load_model

pytestmark = pytest.mark.ray
Cli = Callable[..., tuple[int, str, str]]
SLOT = {"num_cpus": 0.5}


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    members = [member for i in range(150) for member in sample(str(i), noise_jpeg(i, 16), None, [f"picture {i}", f"no. {i}"])]
    return str(write_tar(tmp_path / "pairs.tar", members))


def test_pool_answers_as_one_actor_does_though_its_actors_die(
    ray_cluster: None, pairs: str, tmp_path: Path, tiny_model: str
) -> None:
    sets, service = {"retrieval": RetrievalSetConfig(pairs)}, ServiceConfig(batch_size=16, cache_dir=str(tmp_path))
    loaded = load_model(tiny_model, "random")
    weights = ray.put(loaded.model.state_dict())
    pools = [EvaluatorPool(sets, service, [SLOT] * number, threads=1) for number in (1, 2)]
    one, two = pools
    source = Trained(ray.put(loaded), weights)
    alone = ray.get(one.ask(source)[0].result)
    assert one.num_decoded() == {"retrieval": 150}
    assert ray.get(two.ask(source)[0].result).predictions == alone.predictions
    assert two.num_decoded() == {"retrieval": 0}  # the file of the node serves both pools
    pids = ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in two._actors])
    asked = two.ask(source)[0]
    os.kill(pids[1], signal.SIGKILL)
    assert ray.get(asked.result).predictions == alone.predictions
    assert two.done(asked)["pictures"][1] == 150
    for pool in pools:
        pool.close()


def test_model_by_its_words_is_asked_set_by_set(ray_cluster: None, pairs: str, tmp_path: Path, tiny_model: str) -> None:
    sets = {"coco": RetrievalSetConfig(pairs), "retrieval": RetrievalSetConfig(pairs)}
    pool = EvaluatorPool(sets, ServiceConfig(cache_dir=str(tmp_path)), [SLOT], threads=1)
    coco, retrieval = ray.get([asked.result for asked in pool.ask(Spec(tiny_model, "random"))])
    assert (coco.evaluator, retrieval.evaluator) == ("coco", "retrieval")
    assert coco.predictions["rank"] == retrieval.predictions["rank"]  # one model: random weights are drawn once for all its sets
    pool.close()


def test_several_models_are_compared_and_taken_up_where_they_stopped(
    ray_cluster: None, run_cli: Cli, pairs: str, tmp_path: Path, tiny_model: str
) -> None:
    import torch

    for name in ("a", "b"):
        torch.save(load_model(tiny_model, "random").model.state_dict(), tmp_path / f"{name}.pt")
    models = [f"models.{n}.model={tiny_model} models.{n}.pretrained={tmp_path / n}.pt" for n in ("a", "b")]
    output = tmp_path / "E"
    words = ["evaluate", *" ".join(models).split(), "evaluators=[retrieval]", f"retrieval.path={pairs}", f"output={output}"]
    words += [f"service.cache_dir={tmp_path}", "service.num_actors=2"]
    status, out, err = run_cli(*words)
    assert status == 0, err
    assert "retrieval, mean_recall@1: b - a = " in out and "p = " in out
    result = json.loads((output / "results" / "retrieval_b.json").read_text())
    assert set(result) >= {"dataset", "model", "pretrained", "task", "metrics", "language"}  # CLIP_benchmark's
    assert result["pretrained"].endswith("b.pt") and result["task"] == "zeroshot_retrieval"
    low, high = result["intervals"]["image_retrieval_recall@10"]
    assert low <= result["metrics"]["image_retrieval_recall@10"] <= high
    comparison = json.loads((output / "comparison.json").read_text())
    assert {row["metric"] for row in comparison} == set(result["intervals"])
    assert json.loads((output / "manifest.json").read_text())["decoded"] == {"retrieval": 150}

    kept = (output / "results" / "retrieval_a.json").stat().st_mtime_ns
    before = pq.read_table(output / "predictions" / "retrieval_b.parquet")
    (output / "results" / "retrieval_b.json").unlink()
    (output / "manifest.json").unlink()
    status, _, err = run_cli(*words)
    assert status == 0, err
    assert (output / "results" / "retrieval_a.json").stat().st_mtime_ns == kept
    assert pq.read_table(output / "predictions" / "retrieval_b.parquet") == before
    assert json.loads((output / "manifest.json").read_text())["decoded"] == {"retrieval": 0}


def test_more_actors_than_fit_are_refused(ray_cluster: None, run_cli: Cli, pairs: str, tmp_path: Path, tiny_model: str) -> None:
    words = ["evaluate", f"model={tiny_model}", "pretrained=random", "evaluators=[retrieval]", f"retrieval.path={pairs}"]
    for key, reason in (("num_actors=9", "9 CPUs"), ("num_gpus_per_actor=1", "1 GPUs")):
        status, _, err = run_cli(*words, f"service.{key}", f"output={tmp_path / key}")
        assert status == 2 and reason in err and len(err.splitlines()) == 1


def test_what_fails_at_once_leaves_the_folder_to_other_words_and_a_changed_set_does_not(
    ray_cluster: None, run_cli: Cli, pairs: str, tmp_path: Path, tiny_model: str
) -> None:
    Path(pairs).write_bytes(Path(pairs).read_bytes().replace(b"\xff\xd8", b"\0\0", 1))  # no JPEG any more
    words = ["evaluate", f"model={tiny_model}", "pretrained=random", "evaluators=[retrieval]", f"retrieval.path={pairs}"]
    words += [f"service.cache_dir={tmp_path}", f"output={tmp_path / 'E'}"]
    status, _, err = run_cli(*words)
    assert status == 2 and "pairs.tar: 0: cannot be read as a picture" in err and len(err.splitlines()) == 1
    for seed in (0, 1):
        write_tar(Path(pairs), [member for i in range(20) for member in sample(str(i), noise_jpeg(i + seed, 16), f"picture {i}")])
        status, _, err = run_cli(*words)
        assert status == 2 * seed, err
    assert "retrieval_tiny.json is of another state of the set retrieval" in err
