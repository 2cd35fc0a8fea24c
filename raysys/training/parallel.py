"""How the workers hold the model: each a whole copy (DistributedDataParallel), or each a part of every weight (FSDP2's fully_shard).

In: a model, alike on all workers. Out: the module whose backward pass averages gradients over the workers, the norm of all gradients, and
the whole state for checkpoints, which depends neither on the strategy nor on the number of workers: one may write and the other go on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils import get_total_norm

from raysys.training.group import Group

State = dict[str, Any]


def replicate(model: nn.Module, group: Group, device: torch.device) -> nn.Module:
    """The module to call in place of the model: its last forward pass arms the all-reduce of the backward pass."""
    if group.world_size == 1:
        return model
    return nn.parallel.DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None)


def shard(model: nn.Module, group: Group, device: torch.device) -> None:
    """In place: weights become DTensors, gathered a block at a time where they are used. Scalars stay whole (FSDP2 refuses them), and
    :func:`average_unsharded` is due after the backward pass."""
    mesh = init_device_mesh(device.type, (group.world_size,))
    scalars = {p for p in model.parameters() if p.ndim == 0}
    for module in (*blocks(model), model):
        fully_shard(module, mesh=mesh, ignored_params=scalars)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The outermost members of lists of modules that are made of modules themselves: a transformer's blocks, a ResNet's bottlenecks."""
    found: list[nn.Module] = []
    for child in model.children():
        of_modules = next(child.children(), None) is not None and next(child.parameters(), None) is not None
        if of_modules and isinstance(model, nn.ModuleList | nn.Sequential):
            found.append(child)
        else:
            found += blocks(child)
    return found


def average_unsharded(model: nn.Module, group: Group) -> None:
    """Gradients of what :func:`shard` left whole."""
    for p in model.parameters():
        if not isinstance(p, DTensor) and p.grad is not None:
            p.grad = group.mean(p.grad)


def grad_norm(model: nn.Module, group: Group) -> torch.Tensor:
    """2-norm of all gradients, alike on all workers; no wait for the device."""
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    parts = [grad.to_local() for grad in grads if isinstance(grad, DTensor)]
    norm = get_total_norm([grad for grad in grads if not isinstance(grad, DTensor)])
    return torch.hypot(norm, group.sum(get_total_norm(parts).square()).sqrt()) if parts else norm


def is_finite(model: nn.Module) -> torch.Tensor:
    """Whether all numbers that this worker holds of the weights are finite, a scalar; no wait for the device."""
    parts = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return get_total_norm([part.detach() for part in parts if part.numel()], math.inf).isfinite()


def weights(model: nn.Module, group: Group) -> State:
    """``model.state_dict()`` with whole tensors; see :func:`_whole`."""
    state: State = model.state_dict()
    for name, tensor in state.items():
        state[name] = _whole(tensor, group)
    return state


def load_weights(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    own = model.state_dict()
    model.load_state_dict({name: _part_like(own[name], tensor) if name in own else tensor for name, tensor in state.items()})


def moments(model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> State:
    """What the optimiser remembers of every weight, by the weight's name; see :func:`_whole`."""
    return {
        name: {key: _whole(value, group) for key, value in optimizer.state[p].items()}
        for name, p in model.named_parameters()
        if p in optimizer.state
    }


def load_moments(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    for name, p in model.named_parameters():
        if name in state:
            optimizer.state[p] = {
                # in the weight's memory format, which a fused step takes for granted
                key: torch.empty_like(p).copy_(_part_like(p, value)) if value.shape == p.shape else value.to(p.device, copy=True)
                for key, value in state[name].items()
            }


def _whole(tensor: torch.Tensor, group: Group) -> torch.Tensor | None:
    """The tensor itself, or where workers hold parts of it all of it in rank 0's CPU memory; others get None. All must call it."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    whole: torch.Tensor = tensor.full_tensor()
    return whole.detach().cpu() if group.rank == 0 else None


def _part_like(own: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """What this worker holds of it."""
    if not isinstance(own, DTensor):
        return whole
    return distribute_tensor(whole.to(own.device), own.device_mesh, own.placements, src_data_rank=None)
