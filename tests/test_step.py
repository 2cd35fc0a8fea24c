"""The step of one worker and of several (processes with gloo, no Ray), against a plain loop written from open_clip's parts."""

from __future__ import annotations

import copy
import math
import shutil
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.multiprocessing as mp
from conftest import TINY_VIT
from open_clip_train.scheduler import cosine_lr
from torch import distributed

from raysys.config import LOSSES, LoopConfig, OptimConfig
from raysys.training import parallel
from raysys.training.group import Group
from raysys.training.loss import Features, contrast
from raysys.training.step import TrainStep, batch_norm_warning

BATCH, STEPS = 16, 20
UNEVEN = (6, 7, 3)
CLIP_NORM = 8.0
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
LOSS_OF_OPEN_CLIP = {"clip": open_clip.ClipLoss, "siglip": open_clip.loss.SigLipLoss}
SIGLIP = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # as open_clip_train/main.py starts it
PATCH_DROPOUT = TINY_VIT | {"vision_cfg": TINY_VIT["vision_cfg"] | {"patch_size": 4, "patch_dropout": 0.5}}
RESNET = TINY_VIT | {"vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}}
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
        "min": group.min(torch.tensor(abs(group.rank - 1) + 5)).item(),
        "any": [group.any_of(group.rank == 2, False), group.any_of(False, False), group.any_of(True, group.rank == 0)],
    }


def test_all_workers_hear_sums_the_smallest_and_the_flag_of_one(tmp_path: Path) -> None:
    heard = {"sum": [6.0, 60.0], "mean": 2.0, "min": 5, "any": [(True, False), (False, False), (True, True)]}
    assert run_group(tmp_path, UNEVEN, talk) == [heard, heard, heard]


def test_one_worker_talks_to_nobody() -> None:
    alone = Group(0, (4,))
    assert not distributed.is_initialized()
    assert alone.any_of(True, False) == (True, False)
    assert all(say(torch.tensor([2.0])).tolist() == [2.0] for say in (alone.sum, alone.mean, alone.min))
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


def part_and_grads(group: Group, features: Features, loss: str) -> dict[str, torch.Tensor]:
    """The worker's parts of loss and accuracies, and gradients as DistributedDataParallel would see them."""
    own = Features(
        rows(group, features.image_bD).clone().requires_grad_(),
        rows(group, features.text_bD).clone().requires_grad_(),
        features.scale.clone().requires_grad_(),
        None if features.bias is None else features.bias.clone().requires_grad_(),
    )
    part = contrast(own, group, loss)
    (part.loss * group.world_size).backward()
    named = {"image": own.image_bD, "text": own.text_bD, "scale": own.scale, "bias": own.bias}
    grads = {name: tensor.grad for name, tensor in named.items() if tensor is not None}
    return grads | {"loss": part.loss.detach(), "image_accuracy": part.image_accuracy, "text_accuracy": part.text_accuracy}


@pytest.mark.parametrize(
    ("sizes", "loss", "bias"),
    [((16,), "clip", -3.0), ((8, 8), "clip", None), (UNEVEN, "clip", -3.0), ((16,), "siglip", -3.0), (UNEVEN, "siglip", -3.0)],
)
def test_loss_and_gradients_are_those_of_open_clip_with_the_whole_batch(
    tmp_path: Path, sizes: tuple[int, ...], loss: str, bias: float | None
) -> None:
    features = random_features(bias)
    words = {"features": features, "loss": loss}
    parts = [part_and_grads(Group(0, sizes), **words)] if len(sizes) == 1 else run_group(tmp_path, sizes, part_and_grads, **words)

    image, text, scale = (t.clone().requires_grad_() for t in (features.image_bD, features.text_bD, features.scale))
    whole_bias = None if features.bias is None else features.bias.clone().requires_grad_()
    whole = LOSS_OF_OPEN_CLIP[loss]()(image, text, scale, whole_bias)
    whole.backward()
    similarity = features.image_bD @ features.text_bD.T
    found = {
        "image_accuracy": (similarity.argmax(1) == torch.arange(BATCH)).float().mean(),
        "text_accuracy": (similarity.argmax(0) == torch.arange(BATCH)).float().mean(),
    }
    assert 0 < found["image_accuracy"] < 1 or 0 < found["text_accuracy"] < 1

    def total(name: str) -> torch.Tensor:
        return torch.stack([part[name] for part in parts]).sum(0)

    torch.testing.assert_close(total("loss"), whole.detach())
    for name, share in found.items():
        torch.testing.assert_close(total(name), share)
    workers = len(sizes)
    torch.testing.assert_close(torch.cat([part["image"] for part in parts]) / workers, image.grad)
    torch.testing.assert_close(torch.cat([part["text"] for part in parts]) / workers, text.grad)
    torch.testing.assert_close(total("scale") / workers, scale.grad)
    if whole_bias is not None:
        torch.testing.assert_close(total("bias") / workers, whole_bias.grad, atol=1e-6, rtol=1e-5)


def test_every_loss_of_the_config_is_there_and_siglip_asks_for_a_bias() -> None:
    alone = Group(0, (BATCH,))
    assert all(contrast(random_features(-3.0), alone, loss).loss > 0 for loss in LOSSES)
    with pytest.raises(ValueError, match="loss=siglip needs a model with a logit bias"):
        contrast(random_features(None), alone, "siglip")


# ---- steps -----------------------------------------------------------------------------------------------------------


def data(step: int, image_px: int = 32) -> tuple[torch.Tensor, torch.Tensor]:
    """A global batch: uint8 [B, 3, S, S] and texts that begin and end like CLIP's."""
    draw = torch.Generator().manual_seed(step)
    images = torch.randint(0, 256, (BATCH, 3, image_px, image_px), dtype=torch.uint8, generator=draw)
    texts = torch.zeros(BATCH, 16, dtype=torch.int64)
    texts[:, :6] = torch.randint(1, 1000, (BATCH, 6), generator=draw)
    texts[:, 6] = 49407
    return images.contiguous(memory_format=torch.channels_last), texts


def normalised(images: torch.Tensor) -> torch.Tensor:
    return (images / 255 - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def new_model(config: dict[str, Any], locked: str = "", **more: Any) -> torch.nn.Module:
    """:param locked: towers that keep their weights; of the pictures' the last group is trained where ``locked`` says so."""
    torch.manual_seed(0)
    model = open_clip.model.CLIP(**copy.deepcopy(config), **more)
    if "image" in locked:
        model.lock_image_tower(unlocked_groups=1 if "image but the last" in locked else 0)
    if "text" in locked:
        model.lock_text_tower()
    return model


def new_step(
    model: torch.nn.Module,
    group: Group,
    *,
    loss: str = "clip",
    grad_clip_norm: float | None = None,
    freeze_bn_stats: bool = True,
    **loop: Any,
) -> TrainStep:
    return TrainStep(
        model,
        loss=loss,
        mean=MEAN,
        std=STD,
        loop=LoopConfig(**{"precision": "fp32"} | loop),
        optim=OptimConfig(lr=1e-3, warmup_steps=2, grad_clip_norm=grad_clip_norm),
        freeze_bn_stats=freeze_bn_stats,
        device=torch.device("cpu"),
        group=group,
        steps=STEPS,
    )


def train(group: Group, loss: str = "clip", model: dict[str, Any] | None = None, **loop: Any) -> dict[str, Any]:
    """20 steps, the metrics of every other one, the mean losses of two halves, and the weights."""
    metrics, means = [], []
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a user would see from DDP or autograd
        step_fn = new_step(new_model(TINY_VIT, **model or {}), group, loss=loss, grad_clip_norm=CLIP_NORM, **loop)
        for step in range(STEPS):
            images, texts = data(step % 4)
            metrics.append(step_fn(rows(group, images), rows(group, texts), step=step, measure=step % 2 == 0))
            if step % 10 == 9:
                means.append(step_fn.take_mean_loss())
    means.append(step_fn.take_mean_loss())
    assert step_fn.first_bad_step(check_weights=True) is None
    return {"metrics": metrics, "means": means, "weights": step_fn.model_state()}


@cache
def plain_loop(loss: str = "clip", **model: Any) -> dict[str, Any]:
    """What :func:`train` should say, from one process, the whole batch, and open_clip's parts put together as its trainer does."""
    module = new_model(TINY_VIT, **model).train()
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    kept = [p for n, p in named if p.ndim < 2 or "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for _, p in named if not any(p is k for k in kept)]
    groups = [{"params": kept, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.98), eps=1e-6)
    scheduler, loss_fn = cosine_lr(optimizer, 1e-3, 2, STEPS), LOSS_OF_OPEN_CLIP[loss]()
    metrics = []
    for step in range(STEPS):
        lr = scheduler(step)
        optimizer.zero_grad()
        images, texts = data(step % 4)
        image, text, scale, *bias = module(normalised(images), texts)
        value = loss_fn(image, text, scale, *bias)
        value.backward()
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), CLIP_NORM)
        optimizer.step()
        with torch.no_grad():
            module.logit_scale.clamp_(0, math.log(100))
        own, logits = torch.arange(BATCH), image @ text.T
        accuracies = [float((logits.argmax(dim) == own).float().mean()) for dim in (1, 0)]
        numbers = (value.item(), *accuracies, scale.item(), lr, norm.item())
        metrics.append(
            dict(zip(("loss", "image_accuracy", "text_accuracy", "logit_scale", "lr", "grad_norm"), numbers, strict=True))
        )
    losses = [m["loss"] for m in metrics]
    assert losses[16] < losses[0]  # the same batch
    return {"metrics": metrics, "means": [sum(losses[:10]) / 10, sum(losses[10:]) / 10], "weights": module.state_dict()}


def assert_same_metrics(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for our, their in zip(ours, theirs, strict=True):
        assert our == pytest.approx(their, abs=1e-4)


def assert_same_training(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    for result in results:
        assert_same_metrics(result["metrics"][::2], reference["metrics"][::2])
        assert result["means"][:2] == pytest.approx(reference["means"], abs=1e-4)
        for name, weight in result["weights"].items():
            # AdamW moves every weight by about lr=1e-3 a step: 20 steps that went apart would show
            torch.testing.assert_close(weight, reference["weights"][name], atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")
    first = results[0]["weights"]
    assert all(torch.equal(weight, r["weights"][name]) for r in results for name, weight in first.items())


def trained(folder: Path, sizes: tuple[int, ...], **words: Any) -> list[dict[str, Any]]:
    return [train(Group(0, sizes), **words)] if len(sizes) == 1 else run_group(folder, sizes, train, **words)


@pytest.mark.parametrize(
    ("sizes", "micro_batch"),
    [((16,), None), ((16,), 1), ((16,), 5), ((8, 8), None), ((8, 8), 3), ((4, 4, 4, 4), None), (UNEVEN, None), (UNEVEN, 3)],
)
def test_any_workers_and_micro_batches_learn_like_a_plain_open_clip_loop(
    tmp_path: Path, sizes: tuple[int, ...], micro_batch: int | None
) -> None:
    """Also where the workers have different numbers of micro-batches, and one has but one."""
    assert_same_training(trained(tmp_path, sizes, micro_batch=micro_batch), plain_loop())
    assert {metrics["grad_norm"] > CLIP_NORM for metrics in plain_loop()["metrics"]} == {True, False}


@pytest.mark.parametrize(("sizes", "micro_batch"), [((16,), None), ((16,), 5), ((8, 8), None), ((8, 8), 3)])
def test_siglip_learns_like_a_plain_open_clip_loop(tmp_path: Path, sizes: tuple[int, ...], micro_batch: int | None) -> None:
    assert_same_training(
        trained(tmp_path, sizes, micro_batch=micro_batch, loss="siglip", model=SIGLIP), plain_loop("siglip", **SIGLIP)
    )


def test_steps_that_are_not_measured_say_nothing_and_no_steps_have_no_mean() -> None:
    step_fn, (images, texts) = new_step(new_model(TINY_VIT), Group(0, (BATCH,))), data(0)
    assert step_fn(images, texts, step=0, measure=False) == {}
    assert step_fn.take_mean_loss() > 0
    assert math.isnan(step_fn.take_mean_loss())


@pytest.mark.parametrize(
    ("locked", "sizes", "micro_batch"),
    [("image", (16,), None), ("image but the last", (8, 8), None), ("text", (8, 8), 3), ("image, text", (16,), 5)],
)
def test_locked_towers_learn_like_a_plain_open_clip_loop(
    tmp_path: Path, locked: str, sizes: tuple[int, ...], micro_batch: int | None
) -> None:
    words = {"locked": locked}
    results = trained(tmp_path, sizes, micro_batch=micro_batch, model=words)
    assert_same_training(results, plain_loop(**words))
    for name, p in new_model(TINY_VIT, **words).named_parameters():
        assert torch.equal(results[0]["weights"][name], p.detach()) != p.requires_grad, name


def test_the_logit_scale_ends_at_100() -> None:
    step_fn = new_step(new_model(TINY_VIT, init_logit_scale=5.0), Group(0, (BATCH,)))
    step_fn(*data(0), step=0, measure=False)
    assert step_fn.model.logit_scale.item() == pytest.approx(math.log(100))


# ---- compiled --------------------------------------------------------------------------------------------------------

NEEDS_COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which torch.compile needs")


def at_most_graphs(number: int) -> Any:
    """A context in which it is an error to compile the model for more than so many kinds of calls."""
    return torch._dynamo.config.patch(recompile_limit=number, fail_on_recompile_limit_hit=True)


def train_compiled(group: Group) -> dict[str, Any]:
    with at_most_graphs(1):
        return train(group, compile=True)


@pytest.mark.long
@NEEDS_COMPILER
def test_a_compiled_model_learns_like_a_plain_open_clip_loop(tmp_path: Path) -> None:
    assert_same_training(run_group(tmp_path, (8, 8), train_compiled), plain_loop())


@pytest.mark.long
@NEEDS_COMPILER
def test_a_compiled_model_drops_the_same_patches_in_micro_batches_of_two_sizes() -> None:
    words: dict[str, Any] = {"config": PATCH_DROPOUT, "micro_batch": 6}
    with at_most_graphs(4):  # without gradients and with them, of 5 samples and of 6
        compiled = grads_of_a_step(Group(0, (BATCH,)), compile=True, **words)
    eager = grads_of_a_step(Group(0, (BATCH,)), **words)
    assert compiled.keys() == eager.keys()
    for name, grad in eager.items():
        torch.testing.assert_close(compiled[name], grad, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


# ---- state, and sharded weights --------------------------------------------------------------------------------------


def train_part(group: Group, first: int, last: int, state: dict[str, Any] | None = None, **loop: Any) -> dict[str, Any]:
    """Some of the steps, from a state or from the start; with the state after them and the number of weights that this worker holds."""
    step_fn = new_step(new_model(TINY_VIT), group, grad_clip_norm=CLIP_NORM, **loop)
    if state is not None:
        step_fn.load_state(state)
    metrics = []
    for step in range(first, last):
        metrics.append(step_fn(*(rows(group, whole) for whole in data(step % 4)), step=step, measure=True))
    held = sum(getattr(p, "to_local", lambda p=p: p)().numel() for p in step_fn.model.parameters())
    return {"metrics": metrics, "state": step_fn.state(), "held": held}


@pytest.mark.parametrize(("sizes", "micro_batch"), [((9, 7), None), ((8, 8), 3)])
def test_sharded_weights_learn_like_a_plain_open_clip_loop(tmp_path: Path, sizes: tuple[int, ...], micro_batch: int | None) -> None:
    words = {"first": 0, "last": STEPS, "strategy": "fsdp", "micro_batch": micro_batch}
    results = run_group(tmp_path, sizes, train_part, **words)
    for result in results:
        assert_same_metrics(result["metrics"], plain_loop()["metrics"])
    whole = sum(p.numel() for p in new_model(TINY_VIT).parameters())
    assert all(result["held"] < 0.51 * whole for result in results)


def test_blocks_are_those_of_the_towers() -> None:
    vit, resnet = new_model(TINY_VIT), new_model(RESNET)
    assert parallel.blocks(vit) == [*vit.visual.transformer.resblocks, *vit.transformer.resblocks]
    bottlenecks = [block for number in (1, 2, 3, 4) for block in getattr(resnet.visual, f"layer{number}")]
    assert parallel.blocks(resnet) == [*bottlenecks, *resnet.transformer.resblocks]


@pytest.mark.parametrize("strategies", [("fsdp", "ddp"), ("ddp", "fsdp")])
def test_a_state_goes_on_with_another_strategy_and_number_of_workers(tmp_path: Path, strategies: tuple[str, str]) -> None:
    half, state = STEPS // 2, None
    for first, strategy in zip((0, half), strategies, strict=True):
        words: dict[str, Any] = {"first": first, "last": first + half, "state": state, "strategy": strategy}
        alone = strategy == "ddp"
        result = train_part(Group(0, (BATCH,)), **words) if alone else run_group(tmp_path, (8, 8), train_part, **words)[0]
        state = result["state"]
        assert_same_metrics(result["metrics"], plain_loop()["metrics"][first : first + half])
    for name, weight in plain_loop()["weights"].items():
        torch.testing.assert_close(state["state_dict"][name], weight, atol=2e-4, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


# ---- divergence ------------------------------------------------------------------------------------------------------


def bad_step(group: Group) -> int | None:
    step_fn = new_step(new_model(TINY_VIT), group)
    for step in range(4):
        images, texts = (rows(group, whole) for whole in data(step))
        if step == 2 and group.rank == 1:
            images = images.float().fill_(math.nan)
        step_fn(images, texts, step=step, measure=False)
    return step_fn.first_bad_step(check_weights=True)


def test_all_workers_hear_of_the_first_step_with_a_loss_that_is_no_number(tmp_path: Path) -> None:
    assert run_group(tmp_path, (8, 8), bad_step) == [3, 3]


def test_a_gradient_without_bounds_is_a_bad_step_too() -> None:
    step_fn = new_step(new_model(TINY_VIT), Group(0, (BATCH,)))
    step_fn(*data(0), step=0, measure=False)
    assert step_fn.first_bad_step(check_weights=True) is None
    step_fn.model.logit_scale.register_hook(lambda grad: grad + math.inf)
    assert math.isfinite(step_fn(*data(1), step=1, measure=True)["loss"])
    assert step_fn.first_bad_step(check_weights=False) == 2


def test_weights_that_an_update_spoils_are_seen_before_any_loss_is() -> None:
    step_fn = new_step(new_model(TINY_VIT), Group(0, (BATCH,)))
    step_fn(*data(0), step=0, measure=False)
    with torch.no_grad():
        step_fn.model.positional_embedding[0, 0] = math.inf
    assert step_fn.first_bad_step(check_weights=False) is None
    assert step_fn.first_bad_step(check_weights=True) == 1


# ---- micro-batches ---------------------------------------------------------------------------------------------------


def grads_of_a_step(group: Group, config: dict[str, Any], **loop: Any) -> dict[str, torch.Tensor]:
    step_fn = new_step(new_model(config), group, **loop)
    images, texts = data(0)
    torch.manual_seed(100 + group.rank)
    step_fn(rows(group, images), rows(group, texts), step=0, measure=False)
    return {name: p.grad for name, p in step_fn.model.named_parameters()} | {"random": torch.rand(1)}


@pytest.mark.parametrize("sizes", [(16,), (9, 7)])
def test_micro_batches_drop_the_same_patches_in_both_passes(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    """Against the whole batch in one graph, whose pictures drop the patches that they drop in the first pass."""
    words: dict[str, Any] = {"config": PATCH_DROPOUT, "micro_batch": 4}
    results = (
        [grads_of_a_step(Group(0, sizes), **words)] if len(sizes) == 1 else run_group(tmp_path, sizes, grads_of_a_step, **words)
    )

    model, (images, texts) = new_model(PATCH_DROPOUT).train(), data(0)
    features = []
    for rank, share in enumerate(normalised(images).split(sizes)):
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
    whole = grads_of_a_step(alone, TINY_VIT, precision="amp_bf16")
    parts = grads_of_a_step(alone, TINY_VIT, precision="amp_bf16", micro_batch=4)
    exact = grads_of_a_step(alone, TINY_VIT)
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


@pytest.mark.parametrize("freeze_bn_stats", [True, False])
def test_batch_norm_of_locked_layers_keeps_its_statistics_where_it_is_told_to(freeze_bn_stats: bool) -> None:
    model = new_model(RESNET)
    model.visual.layer1.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items() if "running" in name}
    step_fn = new_step(model, Group(0, (BATCH,)), freeze_bn_stats=freeze_bn_stats)
    step_fn(*data(0), step=0, measure=False)
    after = step_fn.model_state()
    kept = {name for name, value in before.items() if torch.equal(after[name], value)}
    assert kept == ({name for name in before if ".layer1." in name} if freeze_bn_stats else set())
