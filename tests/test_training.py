"""Which samples, batches and the loop, in a plain process without Ray."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import S3Server, noise_jpeg, sample, write_tar

from raysys.config import AugmentConfig, CorpusConfig, LoopConfig, OptimConfig, PolicyConfig, SourceConfig, TrainConfig
from raysys.corpus.index import BlockReader
from raysys.errors import UserError
from raysys.models import load_model
from raysys.output import open_output
from raysys.policy.select import filter_annotations
from raysys.regions.annotations import AnnotationFiles
from raysys.regions.annotator import Annotator
from raysys.regions.units import look_at_shard
from raysys.storage import write_bytes
from raysys.training import checkpoint, loop
from raysys.training.ingest import BatchReader
from raysys.training.lock import RunLock
from raysys.training.loop import Host, run_worker
from raysys.training.metrics import read_metrics
from raysys.training.model import training_model
from raysys.training.optimizer import learning_rate
from raysys.training.samples import check_evidence, choose_samples, order_of

LOCAL = Host(rank=0, world_size=1, device=torch.device("cpu"), say=print, validator=None)


def config(tmp_path: Path, corpus: Path, model: str, **more: Any) -> TrainConfig:
    cfg = TrainConfig(
        output=str(tmp_path / "run"),
        corpus=CorpusConfig(path=str(corpus)),
        model=model,
        global_batch=16,
        train=LoopConfig(steps=8, precision="fp32", log_every=1, checkpoint_every=3),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        augment=AugmentConfig(factor=0, crop_scale_min=0.5, flip=0.5, color_jitter=0.2),
    )
    return replace(cfg, **more)


# ---- batches ---------------------------------------------------------------------------------------------------------


def _reader(cfg: TrainConfig, rank: int, world_size: int, threads: int = 2) -> BatchReader:
    index = choose_samples(cfg, cfg.output)
    return BatchReader(
        index,
        order_of(cfg, index),
        cfg.augment,
        load_model(cfg.model, "random").tokenizer,
        size_px=32,
        num_steps=cfg.num_steps,
        rank=rank,
        world_size=world_size,
        read_threads=threads,
        decode_threads=threads,
        prefetch=3,
        pin_memory=False,
    )


def train_alone(cfg: TrainConfig) -> list[tuple[int, float]]:
    """Train in this process; steps and losses."""
    run_worker(cfg, cfg.output, choose_samples(cfg, cfg.output), LOCAL, RunLock.take(cfg.output), threads=1)
    return [(m["step"], m["loss"]) for m in read_metrics(cfg.output)]


def test_views_of_a_factor_repeat_and_of_0_do_not(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    def first_sample_over_passes(factor: int) -> list[bytes]:
        cfg = config(tmp_path, plain_corpus, tiny_model, global_batch=20, augment=AugmentConfig(factor=factor, crop_scale_min=0.5))
        order = order_of(cfg, choose_samples(cfg, cfg.output))
        seen = []
        for batch in _reader(cfg, 0, 1).batches(0, 8):
            at = np.flatnonzero(order.batch(batch.step)[0] == 0)
            seen += [batch.images[int(i)].numpy().tobytes() for i in at]
        return seen

    assert len(set(first_sample_over_passes(1))) == 1
    assert len(set(first_sample_over_passes(2))) == 2
    assert len(set(first_sample_over_passes(0))) == 4


def test_any_number_of_workers_and_threads_sees_the_same_batches(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    whole = list(_reader(cfg, 0, 1, threads=1).batches(0, 6))
    parts = [list(_reader(cfg, rank, 4, threads=3).batches(0, 6)) for rank in range(4)]
    for step, batch in enumerate(whole):
        assert torch.equal(batch.images, torch.cat([p[step].images for p in parts]))
        assert torch.equal(batch.texts, torch.cat([p[step].texts for p in parts]))


def test_batches_start_at_any_step(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    whole = list(_reader(cfg, 0, 1).batches(0, 7))
    late = list(_reader(cfg, 0, 1).batches(4, 7))
    assert [b.step for b in late] == [4, 5, 6]
    assert all(torch.equal(a.images, b.images) for a, b in zip(whole[4:], late, strict=True))


# ---- which samples ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotator() -> Annotator:
    from raysys.config import OcrConfig

    return Annotator(OcrConfig())


@pytest.fixture
def annotations(tmp_path: Path, small_corpus: Path, annotator: Annotator) -> Path:
    """What raysys annotate writes, without Ray."""
    ocr = {"store_score": 0.3, "recognize": True}
    out = open_output(str(tmp_path / "annotations"), "annotate", {"corpus": {"roots": {"": str(small_corpus)}}, "ocr": ocr})
    for shard in sorted(small_corpus.iterdir()):
        table, made_of, damaged = look_at_shard(str(shard), shard.name, None, annotator)
        AnnotationFiles(out.path, out.fingerprint).write_shard(shard.name, table, made_of=made_of, damaged=damaged)
    out.finish({"samples": 30})
    return tmp_path / "annotations"


def test_policy_decides_which_samples(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, small_corpus, tiny_model, annotations=str(annotations))
    index = choose_samples(cfg, cfg.output)
    assert (len(index), index.num_samples_before, index.reasons) == (24, 30, {"text_area": 4, "html": 2})
    everything = choose_samples(replace(cfg, policy=PolicyConfig(name="none", max_text_area=1.0)), str(tmp_path / "other"))
    assert (len(everything), everything.reasons) == (28, {"html": 2})


def test_a_selection_gives_the_same_samples(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    from raysys.config import FilterConfig

    filter_annotations(
        FilterConfig(output=str(tmp_path / "selection"), annotations=str(annotations), shards=str(tmp_path / "filtered"))
    )
    cfg = config(tmp_path, small_corpus, tiny_model)
    seen = {}
    for name, more in (
        ("selection", {"selection": str(tmp_path / "selection")}),
        ("policy", {"annotations": str(annotations)}),
        ("filtered shards", {"corpus": CorpusConfig(path=str(tmp_path / "filtered"))}),
    ):
        index = choose_samples(replace(cfg, **more), str(tmp_path / name))
        blocks = [BlockReader(index).read(*span) for span in BlockReader(index).ranges(np.arange(len(index)))]
        seen[name] = [(bytes(p), c) for block in blocks for p, c in zip(block.pictures, block.captions.to_pylist(), strict=True)]
    assert len(seen["policy"]) == 24
    assert seen["selection"] == seen["policy"] == seen["filtered shards"]


def test_a_changed_shard_is_refused(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    os.utime(small_corpus / "train-00001.tar", (1, 1))
    with pytest.raises(UserError, match="1 of 2 shards changed since their offsets were taken"):
        choose_samples(config(tmp_path, small_corpus, tiny_model, annotations=str(annotations)), str(tmp_path / "run"))


def test_a_shard_without_annotations_is_refused(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    write_tar(small_corpus / "train-00002.tar", sample("x", noise_jpeg(1)))
    with pytest.raises(UserError, match=r"1 shards of the corpus are not annotated, train-00002.tar first"):
        choose_samples(config(tmp_path, small_corpus, tiny_model, annotations=str(annotations)), str(tmp_path / "run"))


def test_less_than_a_batch_is_refused(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model, global_batch=64)
    with pytest.raises(UserError, match="40 of 40 samples are kept: global_batch=64 takes 64 samples of 40"):
        order_of(cfg, choose_samples(cfg, cfg.output))


def test_another_selection_is_another_run(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    from raysys.config import FilterConfig

    evidence = []
    for name, policy in (("S", PolicyConfig()), ("T", PolicyConfig(name="area", max_text_area=0.2)), ("U", PolicyConfig())):
        filter_annotations(FilterConfig(output=str(tmp_path / name), annotations=str(annotations), policy=policy))
        evidence.append(check_evidence(config(tmp_path, small_corpus, tiny_model, selection=str(tmp_path / name))))
    assert evidence[0] == evidence[2] != evidence[1]


def test_a_corpus_that_changes_under_a_run_is_refused(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    choose_samples(cfg, cfg.output)
    os.utime(plain_corpus / "1.tar", (1, 1))
    with pytest.raises(UserError, match=r"1 of 2 shards changed since their offsets were taken, .*/1.tar first"):
        choose_samples(cfg, cfg.output)


def test_what_cannot_be_trained_on_is_counted(tmp_path: Path, tiny_model: str) -> None:
    members = sample("0", noise_jpeg(0)) + sample("1", None) + sample("2", noise_jpeg(2), None) + sample("../3", noise_jpeg(3))
    write_tar(tmp_path / "c" / "0.tar", [*members, ("4.jpg", noise_jpeg(4)), ("4.txt", b"caf\xe9")])
    index = choose_samples(config(tmp_path, tmp_path / "c", tiny_model), str(tmp_path / "run"))
    assert len(index) == 1 and index.num_samples_before == 5
    assert index.reasons == {"missing_image": 1, "no_caption": 1, "unsafe_name": 1, "caption_not_utf8": 1}


def test_sources_take_their_share_of_every_batch(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    for name, more in (("b/c", 8), ("a", 30)):
        members = [m for i in range(more) for m in sample(str(i), noise_jpeg(i), f"from {name} {i}")]
        write_tar(tmp_path / name.replace("/", "-") / "0.tar", members)
    sources = {"a": SourceConfig(str(tmp_path / "a"), 1.0), "b-c": SourceConfig(str(tmp_path / "b-c"), 3.0)}
    cfg = replace(config(tmp_path, plain_corpus, tiny_model, global_batch=8), corpus=CorpusConfig(None, sources))
    index = choose_samples(cfg, cfg.output)
    order = order_of(cfg, index)
    assert order.shares == [2, 6]
    for step in range(20):
        samples, _ = order.batch(step)
        assert (samples < 30).sum() == 2


def test_a_broken_picture_without_annotations_is_named(tmp_path: Path, small_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, small_corpus, tiny_model)
    with pytest.raises(UserError, match=r"train-0000\d.tar at byte \d+: html; annotate the corpus first"):
        list(_reader(cfg, 0, 1).batches(0, 6))


# ---- step and loop ---------------------------------------------------------------------------------------------------


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    optim = OptimConfig(lr=1.0, warmup_steps=4)
    rates = [learning_rate(step, steps=12, optim=optim) for step in range(13)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[8] == pytest.approx(0.5) and rates[12] == pytest.approx(0)


def test_losses_are_those_of_a_plain_open_clip_loop(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    ours = [loss for _, loss in train_alone(cfg)]

    torch.manual_seed(cfg.seed)
    open_clip.add_model_config(tiny_model)
    model = open_clip.create_model("tiny").train()
    preprocess = open_clip.get_model_preprocess_cfg(model)
    mean, std = (torch.tensor(preprocess[k]).view(1, 3, 1, 1) for k in ("mean", "std"))
    undecayed = [
        p for n, p in model.named_parameters() if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n
    ]
    rest = [p for p in model.parameters() if not any(p is u for u in undecayed)]
    optimizer = torch.optim.AdamW(
        [{"params": undecayed, "weight_decay": 0.0}, {"params": rest, "weight_decay": 0.2}], lr=1e-3, betas=(0.9, 0.98), eps=1e-6
    )
    loss_fn, reference = open_clip.ClipLoss(), []
    for batch in _reader(cfg, 0, 1).batches(0, 8):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(batch.step, steps=8, optim=cfg.optim)
        image, text, scale = model((batch.images / 255.0 - mean) / std, batch.texts)
        loss = loss_fn(image, text, scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.append(loss.item())
    assert ours == pytest.approx(reference, abs=1e-4)
    assert reference[-1] < reference[0]


def test_killed_and_resumed_gives_the_losses_of_the_run_never_killed(
    tmp_path: Path, plain_corpus: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = config(tmp_path, plain_corpus, tiny_model, output=str(tmp_path / "whole"))
    never_killed = train_alone(whole)

    class Killed(Exception):
        pass

    def dies_in_step_5(self: Any, images: torch.Tensor, texts: torch.Tensor, *, step: int, measure: bool) -> dict[str, float]:
        if step == 5:
            raise Killed
        return step_before(self, images, texts, step=step, measure=measure)

    killed = replace(whole, output=str(tmp_path / "killed"))
    step_before = loop.TrainStep.__call__
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop.TrainStep, "__call__", dies_in_step_5)
        train_alone(killed)
    assert checkpoint.steps_there(killed.output) == [3]
    assert [m["step"] for m in read_metrics(killed.output)] == [1, 2, 3, 4, 5]
    assert train_alone(killed) == never_killed
    assert len(never_killed) == 8


def test_the_clock_asks_for_a_checkpoint(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    loop_config = replace(cfg.train, checkpoint_every=1000, checkpoint_minutes=1e-9, keep_checkpoints=100)
    train_alone(replace(cfg, train=loop_config))
    assert checkpoint.steps_there(cfg.output) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_micro_batches_do_not_change_the_losses(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    whole = config(tmp_path, plain_corpus, tiny_model)
    parts = replace(whole, output=str(tmp_path / "parts"), train=replace(whole.train, micro_batch=5))
    assert [loss for _, loss in train_alone(parts)] == pytest.approx([loss for _, loss in train_alone(whole)], abs=1e-5)


def test_compiling_without_a_compiler_is_refused_in_one_line(
    tmp_path: Path, plain_corpus: Path, tiny_model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    cfg.train = replace(cfg.train, compile=True)
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("CC", "gcc")  # of no use to a CPU's code
    with pytest.raises(UserError, match=r"train.compile=true: CXX=no-such-compiler is not there on .*; install it on every node"):
        train_alone(cfg)


def test_the_log_says_what_a_step_took(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    cfg.augment = replace(cfg.augment, schedule="ramp")
    train_alone(cfg)
    last = read_metrics(cfg.output)[-1]
    assert last.keys() >= {"loss", "image_accuracy", "text_accuracy", "logit_scale", "lr", "grad_norm", "samples_per_s", "step_s"}
    assert last["augmentation_strength"] == 7 / 8 and 0 <= last["data_wait_share"] <= 1 and last["rss_mb"] > 50
    pictures = 40 * [len(noise_jpeg(0))]
    used = sum(m["bytes_used"] for m in read_metrics(cfg.output))
    assert used == pytest.approx(8 * 16 * np.mean(pictures), rel=0.2)


def test_the_newest_checkpoints_stay(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    train_alone(cfg)
    assert checkpoint.steps_there(cfg.output)[-2:] == [6, 8]


def test_the_open_clip_folder_is_the_last_checkpoint(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    train_alone(cfg)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{cfg.output}/open_clip")
    state = checkpoint.load_newest(cfg.output)
    assert state is not None and state["step"] == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["state_dict"][name]), name
    assert preprocess is not None


def test_any_checkpoint_is_a_start_and_open_clip_loads_it(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    train_alone(cfg)
    file = f"{cfg.output}/checkpoints/step-6/state.pt"
    weights = checkpoint.load(cfg.output, 6)["state_dict"]
    open_clip.add_model_config(tiny_model)
    theirs = open_clip.create_model("tiny", pretrained=file)
    ours = training_model(replace(cfg, pretrained=file)).model
    for model in (theirs, ours):
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_run_on_an_object_store_has_the_losses_of_a_local_one(
    tmp_path: Path, plain_corpus: Path, tiny_model: str, s3: S3Server
) -> None:
    bucket = s3.new_bucket()
    for shard in plain_corpus.iterdir():
        write_bytes(f"{bucket}/c/{shard.name}", shard.read_bytes())
    local = config(tmp_path, plain_corpus, tiny_model)
    away = replace(local, corpus=CorpusConfig(path=f"{bucket}/c"), output=f"{bucket}/R")
    before = len(s3.requests())
    assert train_alone(away) == train_alone(local)
    ranges = [r for r in s3.requests()[before:] if r.startswith("GET") and "/c/" in r and r.endswith(".tar")]
    assert len(ranges) < 8 * 16 / 2  # 16 lanes of two or three pictures: neighbours come together even so
    assert checkpoint.steps_there(away.output)[-2:] == [6, 8]
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{local.output}/open_clip")
    state = checkpoint.load_newest(away.output)
    assert state is not None and all(torch.equal(tensor, state["state_dict"][name]) for name, tensor in model.state_dict().items())
