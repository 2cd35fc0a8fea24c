"""One optimisation step of CLIP: forward, contrastive loss over all workers, backward, AdamW.

In: a worker's pictures and texts of a step. Out: changed weights, and metrics of the global batch. The recipe is open_clip's; the logit
scale is held at most ln 100. A worker's share goes through the model at once or in micro-batches (GradCache), with the same loss. Leaves
to others which samples, how many steps, which weights are trained (``requires_grad``), and the seeds of dropout.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from raysys.config import LoopConfig, OptimConfig
from raysys.training import parallel
from raysys.training.group import Group
from raysys.training.loss import Contrast, Features, contrast
from raysys.training.optimizer import learning_rate, make_optimizer

_NEVER = torch.iinfo(torch.int64).max


def batch_norm_warning(model: nn.Module, group: Group, micro_batch: int | None) -> str | None:
    """One line where the model trains batch norm and the global batch is cut, so that its statistics are those of a cut; else None."""
    layers = sum(not _is_locked(layer) for layer in _batch_norms(model))
    in_parts = _in_parts(group, micro_batch)
    if layers == 0 or (group.world_size == 1 and not in_parts):
        return None
    samples = -(-group.size // _num_parts(group.size, micro_batch))
    by, twice = "num_workers", ""
    if in_parts:
        by = "num_workers and train.micro_batch"
        twice = "; micro-batches go forward twice, so its running statistics are updated twice a step"
    return (
        f"the model has batch norm ({layers} layers): its statistics are those of {samples} samples, not of the global batch of "
        f"{group.global_batch}, so losses depend on {by}{twice}; a model with layer norm only (any ViT) has the same losses anyhow"
    )


class TrainStep:
    """Model, loss and optimiser of one worker."""

    def __init__(
        self,
        model: nn.Module,
        *,
        loss: str,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        loop: LoopConfig,
        optim: OptimConfig,
        freeze_bn_stats: bool,
        device: torch.device,
        group: Group,
        steps: int,
    ) -> None:
        """
        :param model: alike on all workers; it is changed in place, and the names of its weights stay.
        :param loss: one of ``config.LOSSES``.
        :param mean: of the pictures' channels, 0..1, like ``std``.
        :param freeze_bn_stats: batch norm layers whose own weights are not trained keep their statistics too.
        :param steps: of the whole run, for the learning rate.
        """
        if device.type == "cuda":  # as open_clip's trainer: TF32 where float32 is asked for
            torch.set_float32_matmul_precision("high")
            torch.backends.cudnn.benchmark = True
        self._loss, self._loop, self._optim, self._device, self._group, self._steps = loss, loop, optim, device, group, steps
        self._sharded = loop.strategy == "fsdp" and group.world_size > 1
        self.model = model.to(device)
        if loop.channels_last and not self._sharded:  # FSDP2 takes no weights in this format; convolutions get their pictures in it
            self.model = self.model.to(memory_format=torch.channels_last)
        self._frozen_norms = [layer for layer in _batch_norms(self.model) if freeze_bn_stats and _is_locked(layer)]
        if loop.compile:
            # Not dynamic: a share is cut in micro-batches of at most two sizes, and fixed ones are faster. Random numbers as without
            # compiling, so that both passes of a micro-batch draw the same and a resumed run goes on with either.
            how: dict[str, Any] = {"dynamic": False, "options": {"fallback_random": True}}
            if self._sharded:  # block by block, as FSDP2 gathers weights between them
                for block in parallel.blocks(self.model):
                    block.forward = torch.compile(block.forward, **how)
            else:
                self.model.compile(**how)
        if self._sharded:
            assert len({_num_parts(size, loop.micro_batch) for size in group.sizes}) == 1, (
                "each forward pass gathers weights from all"
            )
            parallel.shard(self.model, group, device)
        self._parallel = self.model if self._sharded else parallel.replicate(self.model, group, device)
        self.optimizer = make_optimizer(self.model, optim)
        self._mean = torch.tensor(mean, device=device).view(1, 3, 1, 1) * 255
        self._std = torch.tensor(std, device=device).view(1, 3, 1, 1) * 255
        self._loss_sum, self._loss_count = torch.zeros((), device=device), 0
        self._first_bad, self._done = torch.full((), _NEVER, device=device), 0

    def __call__(self, images: torch.Tensor, texts: torch.Tensor, *, step: int, measure: bool) -> dict[str, float]:
        """Do step ``step`` (from 0) on this worker's uint8 images [b, 3, S, S] and texts [b, context].

        :param measure: also return the metrics; alike on all workers, as they talk about them, and they wait for the device. ``loss``,
            ``image_accuracy`` and ``text_accuracy`` (share of the pictures whose own text is the nearest, and the other way round) are
            those of the global batch, ``grad_norm`` is before clipping.
        """
        self.model.train()
        for layer in self._frozen_norms:
            layer.eval()
        lr = learning_rate(step, steps=self._steps, optim=self._optim)
        for params in self.optimizer.param_groups:
            params["lr"] = lr
        images = images.to(self._device, non_blocking=True)
        texts = texts.to(self._device, non_blocking=True)
        self.optimizer.zero_grad(set_to_none=True)
        backward = self._backward_in_parts if _in_parts(self._group, self._loop.micro_batch) else self._backward_at_once
        part, scale = backward(images, texts)
        if self._sharded:
            parallel.average_unsharded(self.model, self._group)
        norm = parallel.grad_norm(self.model, self._group)
        if self._optim.grad_clip_norm:
            for params in self.optimizer.param_groups:  # the gradients of each are of one kind, sharded or not
                nn.utils.clip_grads_with_norm_(params["params"], self._optim.grad_clip_norm, norm)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(100))  # type: ignore[operator]
        self._loss_sum += part.loss.detach()
        self._loss_count += 1
        self._done = step + 1
        good = part.loss.detach().isfinite() & norm.isfinite()
        self._first_bad = torch.minimum(self._first_bad, torch.where(good, _NEVER, self._done))
        if not measure:
            return {}
        whole = self._group.sum(torch.stack([part.loss, part.image_accuracy, part.text_accuracy]))
        loss, image_accuracy, text_accuracy = whole.tolist()
        return {
            "loss": loss,
            "image_accuracy": image_accuracy,
            "text_accuracy": text_accuracy,
            "logit_scale": float(scale),
            "lr": lr,
            "grad_norm": float(norm),
        }

    def take_mean_loss(self) -> float:
        """Mean loss of the global batch over the steps since the last call, the same on all workers; all must call it after the same
        step, as they add up their parts. nan where there was no step."""
        total = float(self._group.sum(self._loss_sum))
        mean = total / self._loss_count if self._loss_count else math.nan
        self._loss_sum.zero_()
        self._loss_count = 0
        return mean

    def first_bad_step(self, *, check_weights: bool) -> int | None:
        """The first step since the start of this process whose loss or gradient was not a finite number, on any worker; the same on all,
        and all must call it after the same step. Here steps count from 1: the number done with it. Weights after it are worthless.

        :param check_weights: look at the weights too, which an update may spoil before any loss shows it; counts for the last step.
        """
        if check_weights:
            self._first_bad = torch.minimum(self._first_bad, torch.where(parallel.is_finite(self.model), _NEVER, self._done))
        first = int(self._group.min(self._first_bad))
        return None if first == _NEVER else first

    def state(self) -> dict[str, Any]:
        """``state_dict`` (open_clip's name for weights) and ``optimizer`` (by names of weights) for :meth:`load_state`, with any strategy and number of workers.

        All workers must call it; rank 0 gets all of it. Tensors may be those of the next step: copy them before it.
        """
        return {"state_dict": self.model_state(), "optimizer": parallel.moments(self.model, self.optimizer, self._group)}

    def model_state(self) -> dict[str, Any]:
        """The model's part of :meth:`state`, on the same terms."""
        return parallel.weights(self.model, self._group)

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state`; every worker has all of it."""
        parallel.load_weights(self.model, state["state_dict"])
        parallel.load_moments(self.model, self.optimizer, state["optimizer"])

    def _backward_at_once(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[Contrast, torch.Tensor]:
        """Gradients of the global batch's loss in the weights; returns this worker's part of the numbers, and the logits' scale."""
        features = self._features(self._parallel, images, texts)
        return self._loss_backward(features), features.scale.detach()

    def _backward_in_parts(self, images: torch.Tensor, texts: torch.Tensor) -> tuple[Contrast, torch.Tensor]:
        """As :meth:`_backward_at_once` with the activations of one micro-batch in memory: GradCache (arXiv:2101.06983).

        First all features without activations, and the loss's gradient in them; then each micro-batch again, with that gradient.
        """
        number = _num_parts(self._group.size, self._loop.micro_batch)
        batches = list(zip(images.tensor_split(number), texts.tensor_split(number), strict=True))
        states, parts = [], []
        with torch.no_grad():
            for batch in batches:
                states.append(_random_state(self._device))
                parts.append(self._features(self.model, *batch))
        whole = _join_as_leaves(parts)
        result = self._loss_backward(whole)

        sizes = [len(part.image_bD) for part in parts]
        image_grads, text_grads = _grad(whole.image_bD).split(sizes), _grad(whole.text_bD).split(sizes)
        for i, batch in enumerate(batches):
            _set_random_state(states[i], self._device)  # the same dropout as in the first pass
            last = i == len(batches) - 1
            # Gradients add up in the weights; only DDP's own forward pass arms its all-reduce, which takes the sums. (no_sync would
            # not do: its forward passes broadcast buffers, and workers may have different numbers of micro-batches.) FSDP2 averages
            # each micro-batch's gradients as they come.
            part = self._features(self._parallel if last else self.model, *batch)
            pairs = [(part.image_bD, image_grads[i]), (part.text_bD, text_grads[i])]
            if last:  # scale and bias are not of one micro-batch: their gradient is of the whole share, and counts once
                pairs.append((part.scale, _grad(whole.scale)))
                if part.bias is not None and whole.bias is not None:
                    pairs.append((part.bias, _grad(whole.bias)))
            pairs = [(output, grad) for output, grad in pairs if output.requires_grad]  # features of a locked tower do not
            if pairs:
                torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs])
        return result, whole.scale.detach()

    def _features(self, module: nn.Module, images: torch.Tensor, texts: torch.Tensor) -> Features:
        """What the model says of uint8 images [n, 3, S, S] and texts [n, context]."""
        pixels = ((images.float() - self._mean) / self._std).contiguous(
            memory_format=torch.channels_last if self._loop.channels_last else torch.contiguous_format
        )
        with self._autocast():
            out: Any = module(image=pixels, text=texts)
        if isinstance(out, dict):
            return Features(out["image_features"], out["text_features"], out["logit_scale"], out.get("logit_bias"))
        return Features(out[0], out[1], out[2], out[3] if len(out) > 3 else None)

    def _loss_backward(self, features: Features) -> Contrast:
        with self._autocast():
            part = contrast(features, self._group, self._loss)
        (
            part.loss * self._group.world_size
        ).backward()  # gradients are averaged over the workers, the loss is the sum of their parts
        return part

    def _autocast(self) -> torch.autocast:
        # its cache would keep the casts of weights that FSDP2 has already let go
        enabled = self._loop.precision == "amp_bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=enabled, cache_enabled=not self._sharded)


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def _is_locked(layer: nn.Module) -> bool:
    """Whether it has weights of its own and none of them is trained."""
    trained = [p.requires_grad for p in layer.parameters()]
    return len(trained) > 0 and not any(trained)


def _in_parts(group: Group, micro_batch: int | None) -> bool:
    """Whether shares go through the model in micro-batches: on all workers or on none, as their collectives must come in one order."""
    return micro_batch is not None and micro_batch < max(group.sizes)


def _num_parts(size: int, micro_batch: int | None) -> int:
    """Micro-batches of a share of ``size`` samples, each of at most ``micro_batch``."""
    return -(-size // (micro_batch or size))


def _join_as_leaves(parts: list[Features]) -> Features:
    """The features of all micro-batches, cut off from the model: gradients end in them."""
    first = parts[0]
    return Features(
        torch.cat([part.image_bD for part in parts]).requires_grad_(),
        torch.cat([part.text_bD for part in parts]).requires_grad_(),
        first.scale.detach().requires_grad_(),
        None if first.bias is None else first.bias.detach().requires_grad_(),
    )


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad


def _random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of the CPU and the GPU: patch dropout draws on the CPU, dropout where its input lies."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def _set_random_state(state: tuple[torch.Tensor, torch.Tensor | None], device: torch.device) -> None:
    on_cpu, on_gpu = state
    torch.set_rng_state(on_cpu)
    if on_gpu is not None:
        torch.cuda.set_rng_state(on_gpu, device)
