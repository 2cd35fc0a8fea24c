"""Nodes of a cluster die, and drivers on a cluster that lives on: each verb ends right, with the numbers of the call that nothing disturbed.

The head is a node without CPUs where the drivers are; three nodes beside it have one CPU each. Each has an address of its own.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
import torch
from conftest import TINY_VIT, Members, free_port, noise_jpeg, sample, start_cli, text_jpeg, wait_for, write_tar

from raysys.models import load_model
from raysys.storage import read_json
from raysys.training.metrics import read_metrics

pytestmark = [pytest.mark.ray, pytest.mark.long]
STORE = 100 << 20
RECIPE = ["global_batch=8", "optim.warmup_steps=2", "augment=strong", "train.precision=fp32", "train.log_every=1"]
STEPS, OF_TRIAL = 600, 300
SOON = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5", "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "8"}
"""Ray Train looks after its workers more often than it would."""


class Nodes:
    """A head and the nodes beside it; and the calls that run on them."""

    def __init__(self, tmp_path: Path) -> None:
        from ray.cluster_utils import Cluster

        self._log, self._calls = tmp_path / "log", 0
        dead_soon = {"health_check_period_ms": 500, "health_check_failure_threshold": 4}
        head = {"num_cpus": 0, "object_store_memory": STORE, "dashboard_port": free_port(), "_system_config": dead_soon}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.there: list[Any] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        self._added = 0

    def add(self, number: int = 1) -> None:
        for _ in range(number):
            self._added += 1
            address = f"127.0.0.{1 + self._added}"
            self.there.append(self.cluster.add_node(num_cpus=1, object_store_memory=STORE, node_ip_address=address))

    def start(self, words: list[str]) -> Call:
        call = Call(words, self._log.with_suffix(f".{self._calls}"), str(self.cluster.address))
        self._calls += 1
        self._processes.append(call.process)
        return call

    def with_process(self, *names: str) -> list[Any]:
        """Nodes on which a process bears one of the names."""
        return [node for node in self.there if processes_of(node, *names)]

    def kill(self, node: Any) -> None:
        self.there.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        self.cluster.shutdown()


class Call:
    """The command line in a process of its own, on the cluster."""

    def __init__(self, words: list[str], log: Path, address: str) -> None:
        self.log = log
        self.process = start_cli(words, log, RAY_ADDRESS=address, **SOON)

    def wait_for(self, condition: Callable[[], Any], limit_s: float = 240) -> None:
        wait_for(condition, self.process, self.log, limit_s)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self, status: int = 0, limit_s: float = 600) -> str:
        """:returns: what it printed."""
        try:
            ended = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"hangs:\n{self.log.read_text()}") from None
        assert ended == status, self.log.read_text()
        return self.log.read_text()


def processes_of(node: Any, *names: str) -> list[psutil.Process]:
    """Of Ray's workers on a node, those that bear one of the names."""
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    found = []
    for child in raylet.children(recursive=True):
        try:
            if any(name in " ".join(child.cmdline()) for name in names):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path)
    try:
        nodes.add(3)
        yield nodes
    finally:
        nodes.close()


# ---- annotate ---------------------------------------------------------------------------------------------------------


def tars(folder: Path, num_shards: int = 40, of: int = 25) -> Path:
    for shard in range(num_shards):
        members: Members = []
        for i in range(of):
            number = of * shard + i
            picture = text_jpeg(f"NUMBER {number}") if i % 5 == 0 else noise_jpeg(number, 96)
            members += sample(f"{number:06d}", picture, f"picture {number}")
        write_tar(folder / f"{shard:02d}.tar", members)
    return folder


def rows(annotations: Path) -> Any:
    return ds.dataset(annotations / "shards", format="parquet").to_table().sort_by([("shard", "ascending"), ("index", "ascending")])


def num_files(folder: Path) -> int:
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def test_annotate_has_the_same_rows(nodes: Nodes, tmp_path: Path) -> None:
    words = ["annotate", f"corpus.path={tars(tmp_path / 'c')}", "ocr=fast", "ocr.unit_mb=.1"]
    whole, broken, resumed = (tmp_path / name for name in ("whole", "broken", "resumed"))
    nodes.start([*words, f"output={whole}"]).end()
    call = nodes.start([*words, f"output={broken}"])
    call.wait_for(lambda: num_files(broken / "shards") > 5)
    nodes.kill(nodes.with_process("UnitAnnotator")[0])
    there, killed = num_files(broken / "shards"), time.monotonic()
    call.wait_for(lambda: num_files(broken / "shards") > there + 2)
    print(f"went on after {time.monotonic() - killed:.0f} s")
    call.end()
    assert rows(broken).equals(rows(whole)) and len(rows(whole)) == 1000

    call = nodes.start([*words, f"output={resumed}"])
    call.wait_for(lambda: num_files(resumed / "shards") > 5)
    call.kill()
    assert "40 shards are done already" in nodes.start([*words, f"output={resumed}"]).end()
    assert rows(resumed).equals(rows(whole))


# ---- train ------------------------------------------------------------------------------------------------------------


def words_of_train(corpus: Path, model: str, steps: int = STEPS) -> list[str]:
    return ["train", f"corpus.path={corpus}", f"model={model}", *RECIPE, f"train.steps={steps}", "train.checkpoint_every=20"]


def step_of(run: Path) -> int:
    lines = read_metrics(str(run))
    return int(lines[-1]["step"]) if lines else 0


def losses(run: Path, steps: int = STEPS) -> list[float]:
    """Of the log: each step once."""
    lines = [line for line in read_metrics(str(run)) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    assert (run / "metrics.jsonl").read_text().count('"loss"') == steps
    return [line["loss"] for line in lines]


def test_train_goes_on_on_the_spare_node_then_waits_for_one(
    nodes: Nodes, tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = [*words_of_train(plain_corpus, tiny_model), "num_workers=2"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    nodes.start([*words, f"output={whole}"]).end()
    call = nodes.start([*words, f"output={broken}"])
    call.wait_for(lambda: step_of(broken) > 100)
    workers = nodes.with_process("RayTrainWorker")
    assert len(workers) == 2
    nodes.kill(workers[0])
    at, killed = step_of(broken), time.monotonic()
    call.wait_for(lambda: step_of(broken) > at + 20)
    print(f"went on on the spare node after {time.monotonic() - killed:.0f} s")
    nodes.kill(nodes.there[0])
    killed = time.monotonic()
    call.wait_for(lambda: "train with 2 workers needs 1.8 CPUs, the cluster has 1; waiting for nodes" in call.log.read_text())
    print(f"said that it waits after {time.monotonic() - killed:.0f} s")
    time.sleep(20)  # longer than Ray Train tries to start workers once
    at = step_of(broken)
    nodes.add()
    added = time.monotonic()
    call.wait_for(lambda: step_of(broken) > at)
    print(f"went on {time.monotonic() - added:.0f} s after a node came")
    assert "there is room again" in call.end()
    assert losses(broken) == pytest.approx(losses(whole), abs=1e-4)


def test_elastic_workers_come_and_go_and_the_losses_stay(nodes: Nodes, tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    """num_workers=[1,3]: a node dies, another comes. The global batch stays; 3 do not divide it."""
    words = words_of_train(plain_corpus, tiny_model, steps=20_000)
    run, whole = tmp_path / "R", tmp_path / "whole"
    call = nodes.start([*words, "num_workers=[1,3]", f"output={run}"])

    def steps_by(workers: int) -> int:
        return sum(line["num_workers"] == workers for line in read_metrics(str(run)))

    call.wait_for(lambda: steps_by(3) > 45)  # more than a checkpoint, so that some of them stay
    nodes.kill(nodes.with_process("RayTrainWorker")[0])
    killed = time.monotonic()
    call.wait_for(lambda: steps_by(2) > 0)
    print(f"went on with two {time.monotonic() - killed:.0f} s after the node died")
    call.wait_for(lambda: steps_by(2) > 45)
    nodes.add()
    added, with_three = time.monotonic(), steps_by(3)
    call.wait_for(lambda: steps_by(3) > with_three)
    print(f"went on with three {time.monotonic() - added:.0f} s after a node came")
    call.kill()
    lines = read_metrics(str(run))
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert {line["num_workers"] for line in lines} >= {2, 3}

    call = nodes.start([*words, f"output={whole}"])
    call.wait_for(lambda: step_of(whole) > len(lines))
    call.kill()
    far = max(abs(a["loss"] - b["loss"]) for a, b in zip(lines, read_metrics(str(whole)), strict=False))
    print(f"losses over {len(lines)} steps are at most {far:.1e} apart")
    assert far < 1e-2


def test_train_ends_when_nodes_die_too_often_and_a_killed_driver_leaves_the_cluster_to_the_next(
    nodes: Nodes, tmp_path: Path, plain_corpus: Path, tiny_model: str
) -> None:
    words = [*words_of_train(plain_corpus, tiny_model), "num_workers=2", f"output={tmp_path / 'R'}"]
    call = nodes.start([*words, "train.max_failures=0"])
    call.wait_for(lambda: step_of(tmp_path / "R") > 50)
    nodes.kill(nodes.with_process("RayTrainWorker")[0])
    printed = call.end(status=1)
    assert "Traceback" not in printed
    assert "workers died 1 times, train.max_failures=0" in printed.splitlines()[-1]
    at = step_of(tmp_path / "R")
    call = nodes.start(words)
    call.wait_for(lambda: step_of(tmp_path / "R") > at + 100)
    call.kill()
    began = time.monotonic()
    printed = nodes.start(words).end()
    print(f"the same words took {time.monotonic() - began:.0f} s: {printed}")
    losses(tmp_path / "R")


def test_train_goes_on_when_its_evaluator_dies(nodes: Nodes, tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    words = [*words_of_train(plain_corpus, tiny_model), "train.validate_every=100", *words_of_pairs(tmp_path, 300)]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    nodes.start([*words, f"output={whole}"]).end()
    call = nodes.start([*words, f"output={broken}"])
    call.wait_for(lambda: any("val/score" in line for line in read_metrics(str(broken))))
    [node] = nodes.with_process("_EvaluatorActor")
    print(f"beside the worker: {bool(processes_of(node, 'RayTrainWorker'))}")
    nodes.kill(node)
    at, killed = step_of(broken), time.monotonic()
    call.wait_for(lambda: any("val/score" in line and line["step"] > at for line in read_metrics(str(broken))))
    print(f"was validated again after {time.monotonic() - killed:.0f} s")
    print(call.end())
    assert losses(broken) == losses(whole)
    last = read_json(str(broken / "manifest.json"))["validation"]
    assert last == pytest.approx(read_json(str(whole / "manifest.json"))["validation"], abs=1e-6) and last


# ---- evaluate, attack -------------------------------------------------------------------------------------------------


def words_of_pairs(folder: Path, number: int) -> list[str]:
    members = [
        member for i in range(number) for member in sample(f"{i:05d}", noise_jpeg(i, 16), None, [f"picture {i}", f"no. {i}"])
    ]
    file = write_tar(folder / "pairs.tar", members)
    return ["evaluators=[retrieval]", f"retrieval.path={file}", f"service.cache_dir={folder / 'cache'}"]


def answers(evaluation: Path) -> dict[str, Any]:
    """Every single one."""
    return {file.name: pq.read_table(file).to_pydict() for file in sorted((evaluation / "predictions").iterdir())}


def test_evaluate_has_the_same_metrics(nodes: Nodes, tmp_path: Path) -> None:
    slow = TINY_VIT | {"vision_cfg": TINY_VIT["vision_cfg"] | {"layers": 96, "width": 256}}  # type: ignore[operator]
    (tmp_path / "slow.json").write_text(json.dumps(slow))
    torch.save(load_model(str(tmp_path / "slow.json"), "random").model.state_dict(), tmp_path / "slow.pt")
    words = ["evaluate", f"model={tmp_path / 'slow.json'}", f"pretrained={tmp_path / 'slow.pt'}", *words_of_pairs(tmp_path, 3000)]
    whole, broken, resumed = (tmp_path / name for name in ("whole", "broken", "resumed"))
    began = time.monotonic()
    nodes.start([*words, f"output={whole}"]).end()
    print(f"undisturbed: {time.monotonic() - began:.0f} s")
    result = read_json(str(whole / "results" / "retrieval_slow.json"))
    for output in (broken, resumed):
        call = nodes.start([*words, f"output={output}"])
        call.wait_for(lambda: "pictures/s" in call.log.read_text())  # noqa: B023
        assert len(nodes.with_process("_EvaluatorActor")) == len(nodes.there)
        if output == broken:
            nodes.kill(nodes.there[0])
        else:
            call.kill()
            call = nodes.start([*words, f"output={output}"])
        began = time.monotonic()
        print(call.end(), f"after {time.monotonic() - began:.0f} s")
        again = read_json(str(output / "results" / "retrieval_slow.json"))
        assert again["metrics"] == result["metrics"] and again["intervals"] == result["intervals"]
        assert answers(output) == answers(whole)


def test_attack_writes_the_same_bytes(nodes: Nodes, tmp_path: Path) -> None:
    for i in range(2000):
        file = tmp_path / "val" / f"c{i % 4}" / f"{i:04d}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(noise_jpeg(i, 300))
    (tmp_path / "classes.json").write_text(json.dumps({"c0": "hen", "c1": "red fox", "c2": "cat", "c3": "crane"}))
    words = ["attack", f"imagenet.path={tmp_path / 'val'}", f"imagenet.classes={tmp_path / 'classes.json'}", "attack=varied"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    nodes.start([*words, "attack.classes=random", f"output={whole}"]).end()
    call = nodes.start([*words, "attack.classes=random", f"output={broken}"])
    call.wait_for(lambda: num_files(broken / "_parts") > 5)
    nodes.kill(nodes.with_process("_draw_unit")[0])
    there, killed = num_files(broken / "_parts"), time.monotonic()
    call.wait_for(lambda: num_files(broken / "_parts") > there + 2)
    print(f"went on after {time.monotonic() - killed:.0f} s")
    call.end()
    files = {str(file.relative_to(whole)): file.read_bytes() for file in whole.rglob("*") if file.is_file()}
    again = {str(file.relative_to(broken)): file.read_bytes() for file in broken.rglob("*") if file.is_file()}
    assert files.pop("manifest.json") and again.pop("manifest.json") and files == again


# ---- sweep ------------------------------------------------------------------------------------------------------------


def words_of_sweep(tmp_path: Path, corpus: Path, model: str) -> list[str]:
    (tmp_path / "space.yaml").write_text("optim.lr: [1.0e-4, 1.0e-3, 3.0e-3]\n")
    words = words_of_train(corpus, model, OF_TRIAL)[1:]
    pairs = words_of_pairs(tmp_path, 30)
    return ["sweep", f"space={tmp_path / 'space.yaml'}", *words, "measure_steps=0", "max_concurrent=2", *pairs]


def results(sweep: Path) -> list[dict[str, Any]]:
    keep = ("point", "seed", "optim.lr", "status", "steps", "score")
    return [{key: row[key] for key in keep} for row in pq.read_table(sweep / "results.parquet").to_pylist()]


def is_training(sweep: Path) -> bool:
    """Whether a trial is past its first checkpoints."""
    begun = [trial for trial in sweep.glob("trials/*") if not (trial / "result.json").exists()]
    return any(step_of(trial) > 50 for trial in begun)


def test_sweep_has_the_same_results(nodes: Nodes, tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    words = words_of_sweep(tmp_path, plain_corpus, tiny_model)
    whole, broken, resumed = (tmp_path / name for name in ("whole", "broken", "resumed"))
    nodes.start([*words, f"output={whole}"]).end()
    right = results(whole)
    assert len(right) == 3 and {row["status"] for row in right} == {"finished"}
    for output in (broken, resumed):
        call = nodes.start([*words, f"output={output}"])
        call.wait_for(lambda: is_training(output))  # noqa: B023
        began = time.monotonic()
        if output == broken:
            node = nodes.with_process("RayTrainWorker")[0]
            print(f"dies with the evaluator: {bool(processes_of(node, '_EvaluatorActor'))}")
            nodes.kill(node)
            drivers_of_trials = processes_of(nodes.cluster.head_node, "ImplicitFunc.train")
            assert len(drivers_of_trials) == 2
            drivers_of_trials[0].kill()
        else:
            call.kill()
            call = nodes.start([*words, f"output={output}"])
        print(call.end(), f"after {time.monotonic() - began:.0f} s")
        assert [row | {"score": None} for row in results(output)] == [row | {"score": None} for row in right]
        assert [row["score"] for row in results(output)] == pytest.approx([row["score"] for row in right], abs=1e-4)
        for trial in output.glob("trials/*"):
            losses(trial, OF_TRIAL)
