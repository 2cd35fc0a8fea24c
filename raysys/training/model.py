"""The words of a run -> the model that it trains; the one place that knows open_clip's training API.

In: ``model``, ``pretrained``, ``loss``, ``towers`` and ``train.grad_checkpointing``. Out: a model with its start weights, in which what is
locked takes no gradient. Leaves to others: names and files (:mod:`raysys.models`), devices, and the batch norm of locked layers, which
TrainStep keeps in evaluation mode: open_clip's freeze_bn_stats puts other modules in its place, and weights saved so load nowhere else.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from typing import Any

import torch
from torch import nn

from raysys.config import TrainConfig
from raysys.errors import UserError
from raysys.masking import mask
from raysys.models import RANDOM, LoadedModel, check_model, has_own_weights, load_model, model_config, quiet

SIGLIP_INIT = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
"""arXiv:2303.15343, sec. 3.2, and open_clip_train/main.py: at the start every pair is called no match, as nearly all are none."""


def check_training_model(cfg: TrainConfig) -> int:
    """Refuse what cannot be trained so, before anything is fetched or started: the model is built without memory (on ``meta``).

    :returns: its parameters.
    :raises UserError: in one line with the key and the mend.
    """
    check_model(cfg.model, _start(cfg))
    if "multimodal_cfg" in model_config(cfg.model):
        raise UserError(f"model={mask(cfg.model)} is a CoCa model, and there is no captioning loss; take a CLIP model, as ViT-B-32")
    with torch.device("meta"):
        model: Any = _load(cfg, RANDOM, device="meta").model
        _prepare(model, cfg)
    return sum(parameter.numel() for parameter in model.parameters())


def training_model(cfg: TrainConfig) -> LoadedModel:
    """The model of a run as it stands before the first step, on the CPU.

    Weights are those of ``pretrained``; without it a folder's own, else random from torch's stream of the caller. With ``loss=siglip`` the
    model has a bias, and so has the config that is saved. Scale and bias start at :data:`SIGLIP_INIT` where neither the model's config
    nor its weights say otherwise. Weights of CLIP have no bias: both then start there. (open_clip leaves CLIP's scale, up to 100, and
    fills in the bias 0; CLIP's cosines are above 0, so every pair would be called a match.) With ``loss=clip`` a model's bias stays and
    does nothing, as softmax does not see it.

    :raises UserError: as :func:`check_training_model`, and for weights that cannot be had or do not fit.
    """
    loaded = _load(cfg, _start(cfg), device="cpu")
    model: Any = loaded.model
    if cfg.loss == "siglip" and torch.all(model.logit_bias == 0):  # open_clip's load_checkpoint, for weights without one
        with torch.no_grad():
            model.logit_scale.fill_(loaded.config["init_logit_scale"])
            model.logit_bias.fill_(loaded.config["init_logit_bias"])
    _prepare(model, cfg)
    return loaded


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Numbers that are trained, and all."""
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def _start(cfg: TrainConfig) -> str | None:
    """``pretrained`` as :func:`load_model` takes it."""
    return cfg.pretrained if cfg.pretrained is not None or has_own_weights(cfg.model) else RANDOM


def _load(cfg: TrainConfig, pretrained: str | None, *, device: str) -> LoadedModel:
    init = SIGLIP_INIT if cfg.loss == "siglip" else {}
    try:
        return load_model(cfg.model, pretrained, device=device, patch_dropout=cfg.towers.patch_dropout, init=init, stretch=True)
    except UserError as error:
        if "patch_drop_rate" in str(error):  # the argument that timm's models without patches do not know
            raise _no_patches(cfg) from error
        raise


def _prepare(model: Any, cfg: TrainConfig) -> None:
    """Lock towers and set checkpointing, in place."""
    towers = cfg.towers
    if towers.patch_dropout and not any("PatchDropout" in type(module).__name__ for module in model.visual.modules()):
        raise _no_patches(cfg)
    if towers.lock_image:
        _lock(cfg, "lock_image_unlocked_groups", model.lock_image_tower, model)
    if towers.lock_text:
        _lock(cfg, "lock_text_unlocked_layers", model.lock_text_tower, model)
    if not any(p.requires_grad for name, p in model.named_parameters() if not name.startswith("logit_")):
        raise UserError("towers.lock_image and towers.lock_text leave nothing to train; unlock one, or some of its layers")
    if cfg.train.grad_checkpointing:
        _set_grad_checkpointing(model, cfg)


def _lock(cfg: TrainConfig, key: str, lock: Callable[[int], None], model: nn.Module) -> None:
    """Lock a tower but for as many of its last parts as ``towers.key`` says."""
    unlocked, tower = getattr(cfg.towers, key), key.split("_")[1]
    before = count_parameters(model)
    try:
        with redirect_stdout(io.StringIO()):  # HFTextEncoder prints
            lock(unlocked)
    except (AssertionError, AttributeError, KeyError, RuntimeError) as error:
        if unlocked == 0:
            raise
        raise UserError(
            f"towers.{key}={unlocked}: the {tower} tower of model={mask(cfg.model)} can only be locked as a whole; leave the key out"
        ) from error
    if count_parameters(model) == before:
        raise UserError(
            f"towers.{key}={unlocked} leaves nothing of the {tower} tower locked; take fewer, or towers.lock_{tower}=false"
        )


def _set_grad_checkpointing(model: Any, cfg: TrainConfig) -> None:
    """:raises UserError: where a tower has none; open_clip passes over that."""
    with quiet(), warnings.catch_warnings(), suppress(ValueError):  # transformers: a deprecated name; a tower without
        warnings.simplefilter("ignore")
        model.set_grad_checkpointing()
    for name, tower in (("image", model.visual), ("text", model.text if hasattr(model, "text") else model.transformer)):
        flags = ("grad_checkpointing", "gradient_checkpointing")  # open_clip and timm; transformers
        if not any(getattr(module, flag, False) for module in tower.modules() for flag in flags):
            raise UserError(
                f"train.grad_checkpointing=true: the {name} tower of model={mask(cfg.model)} has none; leave the key out"
            )


def _no_patches(cfg: TrainConfig) -> UserError:
    return UserError(
        f"towers.patch_dropout={cfg.towers.patch_dropout}: the image tower of model={mask(cfg.model)} drops no patches; "
        "leave the key out, or take a ViT"
    )
