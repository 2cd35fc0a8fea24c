"""Views, batches, the step and the loop, in a plain process without Ray."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from conftest import noise_jpeg, sample, write_tar

from raysys.config import AugmentConfig, CorpusConfig, LoopConfig, OptimConfig, PolicyConfig, TrainConfig
from raysys.corpus.order import Order
from raysys.models import load_model
from raysys.policy.select import filter_annotations
from raysys.regions.annotations import AnnotationFiles
from raysys.regions.annotator import Annotator
from raysys.regions.units import look_at_shard
from raysys.storage import UserError, open_output
from raysys.training import checkpoint, loop
from raysys.training.augment import crop_box, make_view, view_rng
from raysys.training.ingest import BatchReader
from raysys.training.loop import Host, run_worker
from raysys.training.metrics import read_metrics
from raysys.training.samples import choose_samples
from raysys.training.step import learning_rate

LOCAL = Host(rank=0, world_size=1, device=torch.device("cpu"))


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


# ---- views -----------------------------------------------------------------------------------------------------------


def test_a_view_is_a_function_of_seed_sample_and_view() -> None:
    augment = AugmentConfig(crop_scale_min=0.3, flip=0.5, color_jitter=0.4, gray=0.3, erase=0.5)
    captions = [f"caption {i}" for i in range(5)]

    def view(seed: int, number: int, which: int) -> tuple[bytes, str]:
        pixels, caption = make_view(noise_jpeg(1), captions, size_px=32, augment=augment, rng=view_rng(seed, number, which))
        assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
        return pixels.tobytes(), caption

    assert view(0, 7, 3) == view(0, 7, 3)
    assert len({view(0, 7, 3), view(1, 7, 3), view(0, 8, 3), view(0, 7, 4)}) == 4


def test_no_augmentation_is_a_plain_resize() -> None:
    off = AugmentConfig(crop_scale_min=1.0, caption="first")
    views = [make_view(noise_jpeg(1), ["a", "b"], size_px=32, augment=off, rng=view_rng(s, 0, 0)) for s in range(3)]
    assert all((pixels == views[0][0]).all() and caption == "a" for pixels, caption in views)


def test_crops_keep_to_area_and_aspect() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        x0, y0, x1, y1 = crop_box(200, 100, scale_min=0.4, ratio_max=4 / 3, rng=rng)
        assert 0 <= x0 < x1 <= 200 and 0 <= y0 < y1 <= 100
        assert (x1 - x0) * (y1 - y0) >= 0.39 * 200 * 100 or (y1 - y0) == 100
        assert 0.72 <= (x1 - x0) / (y1 - y0) <= 1.36


def test_views_of_a_factor_repeat_and_of_0_do_not(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    def first_sample_over_passes(factor: int) -> list[bytes]:
        cfg = config(tmp_path, plain_corpus, tiny_model, global_batch=20, augment=AugmentConfig(factor=factor, crop_scale_min=0.5))
        order = Order(40, 20, 0, factor)
        seen = []
        for batch in _reader(cfg, 0, 1).batches(0, 8):
            at = np.flatnonzero(order.batch(batch.step)[0] == 0)
            seen += [batch.images[int(i)].numpy().tobytes() for i in at]
        return seen

    assert len(set(first_sample_over_passes(1))) == 1
    assert len(set(first_sample_over_passes(2))) == 2
    assert len(set(first_sample_over_passes(0))) == 4


# ---- batches ---------------------------------------------------------------------------------------------------------


def _reader(cfg: TrainConfig, rank: int, world_size: int, threads: int = 2) -> BatchReader:
    index, _ = choose_samples(cfg)
    loaded = load_model(cfg.model, "random")
    order = Order(len(index), cfg.global_batch, cfg.seed, cfg.augment.factor)
    return BatchReader(
        index, order, cfg.augment, loaded.tokenizer, size_px=32, rank=rank, world_size=world_size, threads=threads, prefetch=3
    )


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
    index, evidence = choose_samples(cfg)
    assert (len(index), index.num_samples_before, index.reasons) == (24, 30, {"text_area": 4, "html": 2})
    assert evidence["annotations"]
    everything, _ = choose_samples(replace(cfg, policy=PolicyConfig(name="none", max_text_area=1.0)))
    assert (len(everything), everything.reasons) == (28, {"html": 2})


def test_a_selection_gives_the_same_samples(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    from raysys.config import FilterConfig

    filter_annotations(
        FilterConfig(output=str(tmp_path / "selection"), annotations=str(annotations), shards=str(tmp_path / "filtered"))
    )
    cfg = config(tmp_path, small_corpus, tiny_model)
    by_selection, _ = choose_samples(replace(cfg, selection=str(tmp_path / "selection")))
    by_policy, _ = choose_samples(replace(cfg, annotations=str(annotations)))
    assert by_selection.offset.tolist() == by_policy.offset.tolist()
    from_shards, _ = choose_samples(replace(cfg, corpus=CorpusConfig(path=str(tmp_path / "filtered"))))
    assert from_shards.captions.to_pylist() == by_policy.captions.to_pylist()


def test_a_changed_shard_is_refused(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    os.utime(small_corpus / "train-00001.tar", (1, 1))
    with pytest.raises(UserError, match="changed since it was annotated"):
        choose_samples(config(tmp_path, small_corpus, tiny_model, annotations=str(annotations)))


def test_a_shard_without_annotations_is_refused(tmp_path: Path, small_corpus: Path, annotations: Path, tiny_model: str) -> None:
    write_tar(small_corpus / "train-00002.tar", sample("x", noise_jpeg(1)))
    with pytest.raises(UserError, match=r"train-00002.tar of the corpus is not annotated"):
        choose_samples(config(tmp_path, small_corpus, tiny_model, annotations=str(annotations)))


def test_less_than_a_batch_is_refused(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    with pytest.raises(UserError, match="40 of 40 samples are kept, fewer than global_batch=64"):
        choose_samples(config(tmp_path, plain_corpus, tiny_model, global_batch=64))


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
    index, _ = choose_samples(cfg)
    run_worker(cfg, cfg.output, index, LOCAL, threads=1)
    ours = [m["loss"] for m in read_metrics(cfg.output)]

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
    index, _ = choose_samples(whole)
    run_worker(whole, whole.output, index, LOCAL, threads=1)

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
        run_worker(killed, killed.output, index, LOCAL, threads=1)
    assert checkpoint.steps_there(killed.output) == [3]
    assert [m["step"] for m in read_metrics(killed.output)] == [1, 2, 3, 4, 5]
    run_worker(killed, killed.output, index, LOCAL, threads=1)
    a, b = ([(m["step"], m["loss"]) for m in read_metrics(run.output)] for run in (whole, killed))
    assert a == b and len(a) == 8


def test_the_newest_checkpoints_stay(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    index, _ = choose_samples(cfg)
    run_worker(cfg, cfg.output, index, LOCAL, threads=1)
    assert checkpoint.steps_there(cfg.output) == [6, 8]


def test_the_open_clip_folder_is_the_last_checkpoint(tmp_path: Path, plain_corpus: Path, tiny_model: str) -> None:
    cfg = config(tmp_path, plain_corpus, tiny_model)
    index, _ = choose_samples(cfg)
    run_worker(cfg, cfg.output, index, LOCAL, threads=1)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{cfg.output}/open_clip")
    state = checkpoint.load_newest(cfg.output)
    assert state is not None and state["step"] == 8
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state["model"][name]), name
    assert preprocess is not None


def test_log_lines_past_the_checkpoint_are_dropped_and_a_cut_line_is_left_out(tmp_path: Path) -> None:
    from raysys.training.metrics import MetricsLog

    run = str(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 3}\n{"step": 2, "loss": 2}\n{"step": 3, "lo')
    assert [m["step"] for m in read_metrics(run)] == [1, 2]
    log = MetricsLog(run, first_step=1)
    log.write(2, {"loss": 9.0})
    log.close()
    assert [(m["step"], m["loss"]) for m in read_metrics(run)] == [(1, 3), (2, 9.0)]
    assert list((tmp_path / "tensorboard").iterdir())
