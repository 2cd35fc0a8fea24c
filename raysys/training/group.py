"""The workers that train one model: who has which rows of the global batch, and what they tell each other.

In: a worker's rank and everyone's share of the batch. Out: everyone's features with gradients, sums of numbers, and whether anyone raises
a flag. One worker alone needs no torch.distributed; several need an initialised process group (gloo or NCCL), which is the host's
business, and all of them make the same calls in the same order. Leaves gradients of weights to :mod:`raysys.training.parallel`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import distributed


@dataclass(frozen=True)
class Group:
    """One worker's view of all workers."""

    rank: int
    sizes: tuple[int, ...]
    """Samples of each worker in every step, in rank order; they may differ by worker. Their sum is the global batch."""

    def __post_init__(self) -> None:
        assert 0 <= self.rank < len(self.sizes) and min(self.sizes) > 0, f"rank {self.rank} of workers with {self.sizes} samples"

    @property
    def world_size(self) -> int:
        """Number of workers."""
        return len(self.sizes)

    @property
    def size(self) -> int:
        """This worker's samples in every step."""
        return self.sizes[self.rank]

    @property
    def global_batch(self) -> int:
        """Samples of one step over all workers."""
        return sum(self.sizes)

    @property
    def first(self) -> int:
        """Row of this worker's first sample in the global batch."""
        return sum(self.sizes[: self.rank])

    def gather(self, features_bD: torch.Tensor) -> torch.Tensor:
        """Every worker's rows in rank order, [B, D]; the gradient of a row is the sum of what all workers' losses say of it."""
        assert len(features_bD) == self.size, f"{len(features_bD)} rows of a worker with {self.size} samples"
        if self.world_size == 1:
            return features_bD
        gathered: torch.Tensor = _Gather.apply(features_bD, self)
        return gathered

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the workers, element by element; all get it. With NCCL the values must lie on the GPU."""
        total = values.detach().clone()
        if self.world_size > 1:
            distributed.all_reduce(total)
        return total

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """:meth:`sum` by the number of workers: each counts alike, whatever its share."""
        return self.sum(values) / self.world_size

    def min(self, values: torch.Tensor) -> torch.Tensor:
        """As :meth:`sum`, the smallest over the workers."""
        smallest = values.detach().clone()
        if self.world_size > 1:
            distributed.all_reduce(smallest, distributed.ReduceOp.MIN)
        return smallest

    def any_of(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether any worker raises it. Waits for the other processes, never for what GPUs have to do."""
        if self.world_size == 1:
            return flags
        raised = torch.tensor(flags, dtype=torch.uint8)
        distributed.all_reduce(raised, distributed.ReduceOp.MAX, group=_cpu_group())
        return tuple(bool(flag) for flag in raised.tolist())


@cache
def _cpu_group() -> Any:
    """What talks about numbers in the CPU's memory: the process group itself, or gloo beside NCCL."""
    on_gpu = distributed.get_backend() == distributed.Backend.NCCL
    return distributed.new_group(backend="gloo") if on_gpu else None


class _Gather(torch.autograd.Function):
    """all_gather with a gradient; torch.distributed.nn.functional.all_gather, which open_clip uses, is deprecated from torch 2.15."""

    @staticmethod
    def forward(ctx: Any, own_bD: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        # gloo gathers equal shapes only
        padded = own_bD.new_zeros(max(group.sizes), own_bD.shape[1])
        padded[: len(own_bD)] = own_bD
        parts = [torch.empty_like(padded) for _ in group.sizes]
        distributed.all_gather(parts, padded)
        return torch.cat([part[:size] for part, size in zip(parts, group.sizes, strict=True)])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        group: Group = ctx.group
        # float32, as a sum of many workers' bfloat16 would be rounded at each of them
        total_BD = group.sum(grads[0].float().contiguous())
        return total_BD[group.first : group.first + group.size].to(grads[0].dtype), None
