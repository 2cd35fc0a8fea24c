"""The step of one worker and of several (processes with gloo, no Ray), against open_clip's loss and a plain loop."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY_VIT
from torch import distributed

from raysys.config import LoopConfig, OptimConfig
from raysys.training.group import Group
from raysys.training.loss import Features, contrast
from raysys.training.step import TrainStep, batch_norm_warning

BATCH, STEPS = 16, 20
UNEVEN = (6, 7, 3)
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
PATCH_DROPOUT = TINY_VIT | {"vision_cfg": TINY_VIT["vision_cfg"] | {"patch_size": 4, "patch_dropout": 0.5}}
Job = Callable[..., Any]


def run_group(folder: Path, sizes: tuple[int, ...], job: Job, **words: Any) -> list[Any]:
    """What ``job(group, **words)`` returns in each of several processes."""
    mp.set_forkserver_preload(["torch", "open_clip", "raysys.training.step"])  # imports once, forks from there
    mp.start_processes(_worker, (folder, sizes, job, words), nprocs=len(sizes), start_method="forkserver")
    return [torch.load(folder / f"{job.__name__}-{rank}") for rank in range(len(sizes))]


def _worker(rank: int, folder: Path, sizes: tuple[int, ...], job: Job, words: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    rendezvous = f"file://{folder}/rendezvous-{job.__name__}"
    distributed.init_process_group("gloo", rendezvous, rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60))
    torch.save(job(Group(rank, sizes), **words), folder / f"{job.__name__}-{rank}")
    distributed.destroy_process_group()


def rows(group: Group, whole: torch.Tensor) -> torch.Tensor:
    return whole.split(group.sizes)[group.rank]


# ---- what workers tell each other ------------------------------------------------------------------------------------


def talk(group: Group) -> dict[str, Any]:
    return {
        "sum": group.sum(torch.tensor([1.0, 10.0]) * (group.rank + 1)).tolist(),
        "mean": group.mean(torch.tensor(float(group.rank + 1))).item(),
        "any": [group.any_of(group.rank == 2, False), group.any_of(False, False), group.any_of(True, group.rank == 0)],
    }


def test_all_workers_hear_sums_and_the_flag_of_one(tmp_path: Path) -> None:
    heard = {"sum": [6.0, 60.0], "mean": 2.0, "any": [(True, False), (False, False), (True, True)]}
    assert run_group(tmp_path, UNEVEN, talk) == [heard, heard, heard]


def test_one_worker_talks_to_nobody() -> None:
    alone = Group(0, (4,))
    assert not distributed.is_initialized()
    assert alone.any_of(True, False) == (True, False)
    assert alone.sum(torch.tensor([2.0])).tolist() == alone.mean(torch.tensor([2.0])).tolist() == [2.0]
    features = torch.rand(4, 3)
    assert torch.equal(alone.gather(features), features)


def test_rows_of_a_worker_follow_those_of_the_workers_before() -> None:
    groups = [Group(rank, UNEVEN) for rank in range(3)]
    assert [(g.first, g.size, g.world_size, g.global_batch) for g in groups] == [(0, 6, 3, 16), (6, 7, 3, 16), (13, 3, 3, 16)]


def gather_and_weigh(group: Group, features: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    own = rows(group, features).requires_grad_()
    gathered = group.gather(own)
    (gathered * weights[group.rank]).sum().backward()
    assert own.grad is not None
    return gathered.detach(), own.grad


def test_gathered_rows_get_the_gradients_of_all_workers(tmp_path: Path) -> None:
    features, weights = torch.rand(BATCH, 5), torch.rand(3, BATCH, 5)
    results = run_group(tmp_path, UNEVEN, gather_and_weigh, features=features, weights=weights)
    assert all(torch.equal(gathered, features) for gathered, _ in results)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]), weights.sum(0))


def gather_halves(group: Group, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    own = rows(group, features).bfloat16().requires_grad_()
    gathered = group.gather(own)
    (gathered * 0.5).sum().backward()
    assert own.grad is not None
    return gathered.detach(), own.grad


def test_bfloat16_is_gathered_as_it_is(tmp_path: Path) -> None:
    features = torch.rand(BATCH, 5)
    for gathered, grad in run_group(tmp_path, UNEVEN, gather_halves, features=features):
        assert torch.equal(gathered, features.bfloat16())
        assert grad.dtype == torch.bfloat16 and (grad == 1.5).all()


# ---- loss ------------------------------------------------------------------------------------------------------------


def random_features(bias: float | None) -> Features:
    torch.manual_seed(1)
    image, text = (torch.nn.functional.normalize(torch.randn(BATCH, 8), dim=1) for _ in range(2))
    return Features(image, text, torch.tensor(5.0), None if bias is None else torch.tensor(bias))


def part_and_grads(group: Group, features: Features) -> dict[str, torch.Tensor]:
    """The worker's parts of loss and accuracies, and gradients as DistributedDataParallel would see them."""
    own = Features(
        rows(group, features.image_bD).clone().requires_grad_(),
        rows(group, features.text_bD).clone().requires_grad_(),
        features.scale.clone().requires_grad_(),
        None if features.bias is None else features.bias.clone().requires_grad_(),
    )
    part = contrast(own, group)
    (part.loss * group.world_size).backward()
    named = {"image": own.image_bD, "text": own.text_bD, "scale": own.scale, "bias": own.bias}
    grads = {name: tensor.grad for name, tensor in named.items() if tensor is not None}
    return grads | {"loss": part.loss.detach(), "image_accuracy": part.image_accuracy, "text_accuracy": part.text_accuracy}


@pytest.mark.parametrize(("sizes", "bias"), [((16,), -3.0), ((8, 8), None), (UNEVEN, -3.0)])
def test_loss_and_gradients_are_those_of_open_clip_with_the_whole_batch(
    tmp_path: Path, sizes: tuple[int, ...], bias: float | None
) -> None:
    features = random_features(bias)
    if len(sizes) == 1:
        parts = [part_and_grads(Group(0, sizes), features)]
    else:
        parts = run_group(tmp_path, sizes, part_and_grads, features=features)

    image, text, scale = (t.clone().requires_grad_() for t in (features.image_bD, features.text_bD, features.scale))
    loss = open_clip.ClipLoss()(image, text, scale, features.bias)
    loss.backward()
    similarity = features.image_bD @ features.text_bD.T
    found = {
        "image_accuracy": (similarity.argmax(1) == torch.arange(BATCH)).float().mean(),
        "text_accuracy": (similarity.argmax(0) == torch.arange(BATCH)).float().mean(),
    }
    assert 0 < found["image_accuracy"] < 1 or 0 < found["text_accuracy"] < 1

    def total(name: str) -> torch.Tensor:
        return torch.stack([part[name] for part in parts]).sum(0)

    torch.testing.assert_close(total("loss"), loss.detach())
    for name, share in found.items():
        torch.testing.assert_close(total(name), share)
    workers = len(sizes)
    torch.testing.assert_close(torch.cat([part["image"] for part in parts]) / workers, image.grad)
    torch.testing.assert_close(torch.cat([part["text"] for part in parts]) / workers, text.grad)
    torch.testing.assert_close(total("scale") / workers, scale.grad)


# ---- steps -----------------------------------------------------------------------------------------------------------


def data(step: int, image_px: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A global batch: uint8 [B, 3, S, S] and texts that begin and end like CLIP's."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, image_px, image_px), dtype=torch.uint8, generator=draw)
    texts = torch.zeros(BATCH, 16, dtype=torch.int64)
    texts[:, :6] = torch.randint(1, 1000, (BATCH, 6), generator=draw)
    texts[:, 6] = 49407
    return images.contiguous(memory_format=torch.channels_last), texts


def new_model(config: dict[str, Any], **more: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return open_clip.model.CLIP(**copy.deepcopy(config), **more)


def new_step(model: torch.nn.Module, group: Group, micro_batch: int | None, precision: str = "fp32") -> TrainStep:
    return TrainStep(
        model,
        mean=MEAN,
        std=STD,
        loop=LoopConfig(precision=precision, micro_batch=micro_batch),
        optim=OptimConfig(lr=1e-3, warmup_steps=2),
        device=torch.device("cpu"),
        group=group,
        steps=STEPS,
    )


def train(group: Group, micro_batch: int | None = None, precision: str = "fp32", **model: Any) -> dict[str, Any]:
    """20 steps, the metrics of all of them, the mean losses of two halves, and the weights."""
    metrics, means = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a user would see from DDP or autograd
        step_fn = new_step(new_model(TINY_VIT, **model), group, micro_batch, precision)
        for step in range(STEPS):
            images, texts = data(step % 4)
            metrics.append(step_fn(rows(group, images), rows(group, texts), step=step, measure=step % 2 == 0))
            if step % 10 == 9:
                means.append(step_fn.take_mean_loss())
    means.append(step_fn.take_mean_loss())
    weights = {name: weight.detach() for name, weight in step_fn.model.named_parameters()}
    return {"metrics": metrics, "means": means, "weights": weights}


@pytest.fixture(scope="module")
def one_worker() -> dict[str, Any]:
    return train(Group(0, (BATCH,)))


def assert_same_training(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        for ours, theirs in zip(result["metrics"], reference["metrics"], strict=True):
            assert ours == pytest.approx(theirs, abs=1e-4)
        assert result["means"][:2] == pytest.approx(reference["means"][:2], abs=1e-4)
        for name, weight in result["weights"].items():
            # AdamW moves every weight by about lr=1e-3 a step: 20 steps that went apart would show
            torch.testing.assert_close(weight, reference["weights"][name], atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    first = results[0]["weights"]
    assert all(torch.equal(weight, r["weights"][name]) for r in results for name, weight in first.items())


def test_one_worker_learns_like_a_plain_open_clip_loop(one_worker: dict[str, Any]) -> None:
    model = new_model(TINY_VIT).train()
    decayed = [p for n, p in model.named_parameters() if p.ndim >= 2 and "ln" not in n and "bias" not in n]
    rest = [p for p in model.parameters() if not any(p is d for d in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.2}, {"params": rest, "weight_decay": 0.0}], betas=(0.9, 0.98), eps=1e-6
    )
    schedule = [0.5e-3, 1e-3] + [0.5e-3 * (1 + torch.cos(torch.tensor(torch.pi * s / 18)).item()) for s in range(18)]
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    losses = []
    for step, lr in enumerate(schedule):
        for params in optimizer.param_groups:
            params["lr"] = lr
        images, texts = data(step % 4)
        loss = open_clip.ClipLoss()(*model((images / 255 - mean) / std, texts))
        optimizer.zero_grad()
        loss.backward()
        norm = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
        if step % 2 == 0:
            assert one_worker["metrics"][step]["lr"] == pytest.approx(lr)
            assert one_worker["metrics"][step]["grad_norm"] == pytest.approx(norm, abs=1e-4)
            assert one_worker["metrics"][step]["logit_scale"] == pytest.approx(model.logit_scale.exp().item(), abs=1e-4)
        optimizer.step()
        losses.append(loss.item())
    assert [m["loss"] for m in one_worker["metrics"][::2]] == pytest.approx(losses[::2], abs=1e-4)
    assert one_worker["means"][:2] == pytest.approx([sum(losses[:10]) / 10, sum(losses[10:]) / 10], abs=1e-4)
    assert losses[-1] < losses[0] - 0.5


def test_steps_that_are_not_measured_say_nothing_and_no_steps_have_no_mean(one_worker: dict[str, Any]) -> None:
    assert set(one_worker["metrics"][0]) == {"loss", "image_accuracy", "text_accuracy", "logit_scale", "lr", "grad_norm"}
    assert one_worker["metrics"][1] == {}
    assert one_worker["means"][2] != one_worker["means"][2]  # nan


@pytest.mark.parametrize("sizes", [(8, 8), UNEVEN, (4, 4, 4, 4)])
def test_any_number_of_workers_learns_like_one(tmp_path: Path, one_worker: dict[str, Any], sizes: tuple[int, ...]) -> None:
    assert_same_training(run_group(tmp_path, sizes, train), one_worker)


# ---- micro-batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 5, 8])
def test_micro_batches_learn_like_the_whole_batch(one_worker: dict[str, Any], micro_batch: int) -> None:
    assert_same_training([train(Group(0, (BATCH,)), micro_batch)], one_worker)


@pytest.mark.parametrize(("sizes", "micro_batch"), [((8, 8), 3), (UNEVEN, 3), (UNEVEN, 6)])
def test_micro_batches_of_several_workers_learn_like_one_worker(
    tmp_path: Path, one_worker: dict[str, Any], sizes: tuple[int, ...], micro_batch: int
) -> None:
    """Also where the workers have different numbers of them, and some but one."""
    assert_same_training(run_group(tmp_path, sizes, train, micro_batch=micro_batch), one_worker)


def test_a_logit_bias_trains_with_workers_and_micro_batches(tmp_path: Path) -> None:
    with_bias = {"init_logit_bias": -10.0, "output_dict": True}
    assert_same_training(run_group(tmp_path, (8, 8), train, micro_batch=3, **with_bias), train(Group(0, (BATCH,)), **with_bias))


def grads_of_a_step(
    group: Group, micro_batch: int | None, config: dict[str, Any], precision: str = "fp32"
) -> dict[str, torch.Tensor]:
    step_fn = new_step(new_model(config), group, micro_batch, precision)
    images, texts = data(0)
    torch.manual_seed(100 + group.rank)
    step_fn(rows(group, images), rows(group, texts), step=0, measure=False)
    return {name: p.grad for name, p in step_fn.model.named_parameters()} | {"random": torch.rand(1)}


@pytest.mark.parametrize("sizes", [(16,), (9, 7)])
def test_micro_batches_drop_the_same_patches_in_both_passes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Against the whole batch in one graph, whose pictures drop the patches that they drop in the first pass."""
    words: dict[str, Any] = {"micro_batch": 4, "config": PATCH_DROPOUT}
    results = (
        [grads_of_a_step(Group(0, sizes), **words)] if len(sizes) == 1 else run_group(tmp_path, sizes, grads_of_a_step, **words)
    )

    model, (images, texts) = new_model(PATCH_DROPOUT).train(), data(0)
    pixels = (images / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)
    features = []
    for rank, share in enumerate(pixels.split(sizes)):
        torch.manual_seed(100 + rank)
        features += [model.encode_image(part, normalize=True) for part in share.tensor_split(-(-len(share) // 4))]
    open_clip.ClipLoss()(torch.cat(features), model.encode_text(texts, normalize=True), model.logit_scale.exp()).backward()
    for name, p in model.named_parameters():
        for result in results:
            torch.testing.assert_close(result[name], p.grad, atol=1e-6, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert torch.equal(results[-1]["random"], torch.rand(1))  # the stream goes on where it would without a second pass


def test_micro_batches_in_bfloat16_reach_every_weight() -> None:
    """Weights that autocast casts in the first pass, without gradients, must not serve the second."""
    alone = Group(0, (BATCH,))
    whole = grads_of_a_step(alone, None, TINY_VIT, "amp_bf16")
    parts = grads_of_a_step(alone, 4, TINY_VIT, "amp_bf16")
    exact = grads_of_a_step(alone, None, TINY_VIT)
    for name in dict(new_model(TINY_VIT).named_parameters()):
        # bfloat16 has 8 bits; both lie within its noise of the exact gradient
        noise = (whole[name] - exact[name]).norm() + 0.01 * exact[name].norm()
        assert (parts[name] - exact[name]).norm() < 2 * noise, name


# ---- batch norm ------------------------------------------------------------------------------------------------------


def test_batch_norm_is_warned_of_where_the_batch_is_cut() -> None:
    with_batch_norm = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4), torch.nn.BatchNorm1d(4))
    alone, two = Group(0, (16,)), Group(1, (9, 7))
    assert batch_norm_warning(with_batch_norm, alone, None) is None
    assert batch_norm_warning(with_batch_norm, alone, 16) is None
    assert batch_norm_warning(new_model(TINY_VIT), two, 4) is None
    cut_by_workers = batch_norm_warning(with_batch_norm, two, None)
    assert cut_by_workers is not None and "\n" not in cut_by_workers
    assert "batch norm (2 layers)" in cut_by_workers and "of 7 samples" in cut_by_workers and "twice" not in cut_by_workers
    cut_in_parts = batch_norm_warning(with_batch_norm, alone, 6)
    assert cut_in_parts is not None and "of 6 samples" in cut_in_parts and "updated twice a step" in cut_in_parts
