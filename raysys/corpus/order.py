"""In which order a run sees its samples: a pure function of (seed, step), the same for any number of workers.

A position is a step number, so resuming needs no state. Pass p goes through all N samples in an order of its own; view v = p mod k.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np


@dataclass(frozen=True)
class Order:
    num_samples: int
    global_batch: int
    seed: int
    factor: int
    """Distinct views of a sample; 0: a new one on every pass."""

    def __post_init__(self) -> None:
        if self.num_samples < self.global_batch:
            raise ValueError(
                f"global_batch={self.global_batch} is larger than the {self.num_samples} samples kept; a batch must not hold a pair twice"
            )

    def batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples and views of a step, int64 [global_batch] each; no sample stands twice in a batch.

        With fewer samples than two batches every step is a pass of its own over a random part of them.
        """
        n, b = self.num_samples, self.global_batch
        if n < 2 * b:
            return self._permutation(step)[:b], np.full(b, self._view(step))
        positions = np.arange(step * b, (step + 1) * b)
        passes, within = positions // n, positions % n
        samples = np.concatenate([self._pass(int(p))[within[passes == p]] for p in np.unique(passes)])
        return samples, np.array([self._view(int(p)) for p in passes])

    def _view(self, number: int) -> int:
        return number % self.factor if self.factor else number

    def _permutation(self, number: int) -> np.ndarray:
        return _permutation(self.num_samples, self.seed, number)

    def _pass(self, number: int) -> np.ndarray:
        """The order of a pass. Where a batch lies across two passes, the head of the second gives up what the first one's tail holds.

        Heads change within the first n - b places only, so tails (the last b - 1 places) are those of the bare permutation.
        """
        return _pass(self.num_samples, self.global_batch, self.seed, number)


@lru_cache(maxsize=4)
def _permutation(n: int, seed: int, number: int) -> np.ndarray:
    return np.random.default_rng([seed, number]).permutation(n)


@lru_cache(maxsize=4)
def _pass(n: int, b: int, seed: int, number: int) -> np.ndarray:
    order = _permutation(n, seed, number)
    of_pass_before = number * n % b  # samples of the pass before that share the first batch
    if number == 0 or of_pass_before == 0:
        return order
    order = order.copy()
    head = b - of_pass_before
    tail = _permutation(n, seed, number - 1)[n - of_pass_before :]
    clash = np.isin(order, tail)
    give = np.flatnonzero(clash[:head])
    take = head + np.flatnonzero(~clash[head : n - b])[: len(give)]
    order[give], order[take] = order[take], order[give]
    return order
