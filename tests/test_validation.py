"""Validation beside the training, in a plain process: the real evaluator stands where an actor would."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from conftest import noise_jpeg, sample, write_tar

from raysys.config import CorpusConfig, LoopConfig, OptimConfig, RetrievalSetConfig, ServiceConfig, TrainConfig
from raysys.evaluation.evaluator import Evaluator
from raysys.models import LoadedModel, load_model
from raysys.training import checkpoint, step
from raysys.training.lock import RunLock
from raysys.training.loop import Diverged, Host, run_worker
from raysys.training.metrics import read_metrics, read_newest_metrics
from raysys.training.samples import choose_samples
from raysys.training.validation import SCORE


class HereAndNow:
    """A validator that answers when it is waited for, and not before."""

    def __init__(self, path: Path, *, fails_at: int | None = None) -> None:
        self.evaluator = Evaluator({"retrieval": RetrievalSetConfig(str(path))}, ServiceConfig(batch_size=16))
        self.questions, self.fails_at = 0, fails_at

    def set_model(self, blueprint: LoadedModel) -> None:
        self.blueprint = blueprint

    def ask(self, weights: dict[str, torch.Tensor]) -> Any:
        self.questions += 1
        return self.questions, deepcopy(weights)

    def answer(self, ticket: Any, *, wait: bool) -> dict[str, float] | str | None:
        if not wait:
            return None
        number, weights = ticket
        if number == self.fails_at:
            return "the evaluator died"
        self.blueprint.model.load_state_dict(weights)
        recall = next(self.evaluator.results_of(self.blueprint)).metrics["mean_recall@1"]
        return {SCORE: recall, "val/retrieval/mean_recall@1": recall}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    members = [member for i in range(12) for member in sample(str(i), noise_jpeg(i), f"picture 0 {i}")]
    return write_tar(tmp_path / "pairs.tar", members)


@pytest.fixture
def cfg(tmp_path: Path, plain_corpus: Path, tiny_model: str, pairs: Path) -> TrainConfig:
    return TrainConfig(
        output=str(tmp_path / "run"),
        corpus=CorpusConfig(path=str(plain_corpus)),
        model=tiny_model,
        global_batch=16,
        evaluators=["retrieval"],
        retrieval=RetrievalSetConfig(str(pairs)),
        train=LoopConfig(steps=8, precision="fp32", log_every=5, checkpoint_every=100, keep_checkpoints=1, validate_every=2),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
    )


def train(cfg: TrainConfig, validator: HereAndNow | None, said: list[str] | None = None) -> list[dict[str, Any]]:
    host = Host(0, 1, torch.device("cpu"), (said if said is not None else []).append, validator)
    run_worker(cfg, cfg.output, choose_samples(cfg, cfg.output), host, RunLock.take(cfg.output), threads=1)
    return read_metrics(cfg.output)


def scores(lines: list[dict[str, Any]]) -> dict[int, float]:
    return {line["step"]: line[SCORE] for line in lines if SCORE in line}


def test_scores_are_those_of_the_weights_at_their_steps(cfg: TrainConfig, pairs: Path) -> None:
    said: list[str] = []
    lines = train(cfg, HereAndNow(pairs), said)
    assert list(scores(lines)) == [2, 4, 6, 8]
    assert all("loss" in line for line in lines)  # a validated step has its other numbers too
    assert [line["step"] for line in read_newest_metrics(cfg.output) if "loss" in line][-1] == 8
    there = checkpoint.steps_there(cfg.output)
    best = max(scores(lines), key=lambda at: (scores(lines)[at], at))
    assert there == sorted({best, 8})  # the newest and the best stay, though scores came late
    evaluator = Evaluator({"retrieval": RetrievalSetConfig(str(pairs))}, ServiceConfig(batch_size=16))
    for number in there:
        loaded = load_model(cfg.model, f"{cfg.output}/checkpoints/step-{number}/state.pt")
        assert next(evaluator.results_of(loaded)).metrics["mean_recall@1"] == pytest.approx(scores(lines)[number])
    assert f"validation after step 8: score {scores(lines)[8]:.4f}, retrieval/mean_recall@1 {scores(lines)[8]:.4f}" in said
    card = (Path(cfg.output) / "open_clip" / "README.md").read_text()
    assert f"{scores(lines)[8]:.4f}" in card


def test_validation_does_not_change_the_training(cfg: TrainConfig, pairs: Path, tmp_path: Path) -> None:
    validated = train(cfg, HereAndNow(pairs))
    alone = train(replace(cfg, output=str(tmp_path / "alone"), evaluators=[]), None)
    losses = {line["step"]: line["loss"] for line in alone}
    assert [line["loss"] for line in validated if line["step"] in losses] == [losses[s] for s in sorted(losses)]


def test_a_question_without_an_answer_is_said_and_the_run_goes_on(cfg: TrainConfig, pairs: Path) -> None:
    said: list[str] = []
    lines = train(cfg, HereAndNow(pairs, fails_at=2), said)
    assert list(scores(lines)) == [2, 6, 8]
    assert "the model after step 4 was not validated: the evaluator died" in said


def test_a_run_killed_before_its_answer_asks_again(cfg: TrainConfig, pairs: Path) -> None:
    """The checkpoint of step 8 is there, its score is not."""
    never_killed = train(cfg, HereAndNow(pairs))
    log = Path(cfg.output) / "metrics.jsonl"
    lines = [line for line in log.read_text().splitlines() if not (SCORE in line and json.loads(line)["step"] == 8)]
    log.write_text("\n".join(lines) + "\n")
    again = HereAndNow(pairs)
    assert scores(train(cfg, again)) == scores(never_killed)
    assert again.questions == 1


# ---- divergence -------------------------------------------------------------------------------------------------------


def test_a_training_that_diverges_ends_with_its_step_and_the_last_good_checkpoint(
    cfg: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rate = step.learning_rate
    monkeypatch.setattr(step, "learning_rate", lambda at, **words: 1e39 if at == 5 else rate(at, **words))
    cfg = replace(cfg, evaluators=[])
    cfg.train = replace(cfg.train, steps=40, log_every=4, checkpoint_every=2, validate_every=None)
    with pytest.raises(Diverged, match="not finite at step 6; ") as caught:
        train(cfg, None)
    assert checkpoint.steps_there(cfg.output) == [4]  # the newest; none after it
    assert f"the last good checkpoint is {cfg.output}/checkpoints/step-4;" in str(caught.value)
    assert all(weights.isfinite().all() for weights in checkpoint.load(cfg.output, 4)["state_dict"].values())
    assert [line["step"] for line in read_metrics(cfg.output)] == [1, 4]
    assert not (Path(cfg.output) / "open_clip").exists()


def test_a_training_that_diverges_before_a_checkpoint_says_so(cfg: TrainConfig) -> None:
    cfg = replace(cfg, evaluators=[], optim=OptimConfig(lr=1e38, warmup_steps=0))
    cfg.train = replace(cfg.train, log_every=4, validate_every=None)
    with pytest.raises(Diverged, match=r"no checkpoint was due before; begin a new run .* smaller optim.lr"):
        train(cfg, None)


def test_the_open_clip_folder_is_read_by_open_clip(cfg: TrainConfig, tmp_path: Path) -> None:
    """Weights first, config last, and the same embeddings as the last checkpoint's."""
    train(replace(cfg, evaluators=[], loss="siglip"), None)
    folder = Path(cfg.output) / "open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert model.logit_bias is not None and preprocess is not None
    state = checkpoint.load_newest(cfg.output)
    assert state is not None and all(torch.equal(tensor, state["state_dict"][name]) for name, tensor in model.state_dict().items())
    assert (folder / "open_clip_config.json").stat().st_mtime_ns >= (folder / "open_clip_model.safetensors").stat().st_mtime_ns
