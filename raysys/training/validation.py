"""Validation beside the training: weights go to an evaluator, numbers come back some steps later and into the log.

In: a run's weights every now and then. Out: lines of ``metrics.jsonl`` with ``val/SET/METRIC`` and ``val/score`` (higher is better), and the
scores that say which checkpoint is the best. At most one question is under way: training waits where the next one comes before its
answer. A question that fails is told and costs its numbers, not the run. Leaves to others who answers (the services on Ray).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from raysys.evaluation.metrics import PRIMARY
from raysys.models import LoadedModel
from raysys.training.metrics import MetricsLog

SCORE = "val/score"


class Validator(Protocol):
    """Who answers."""

    def set_model(self, blueprint: LoadedModel) -> None:
        """The model whose weights will come; the caller leaves it alone from now on."""

    def ask(self, weights: dict[str, torch.Tensor]) -> Any:
        """Take a copy of the weights; returns a ticket at once."""

    def answer(self, ticket: Any, *, wait: bool) -> dict[str, float] | str | None:
        """Numbers by ``val/SET/METRIC`` and :data:`SCORE`; one line that says why there are none; or None: not yet (never with ``wait``)."""


class Validation:
    """Rank 0's questions."""

    def __init__(self, validator: Validator, log: MetricsLog, say: Callable[[str], None], *, answered: dict[int, float]) -> None:
        """:param answered: step -> score, of a run that goes on."""
        self._validator, self._log, self._say = validator, log, say
        self._under_way: tuple[int, Any] | None = None
        self.scores: dict[int, float | None] = dict(answered)
        """Step -> score; None while its answer is awaited."""

    def ask(self, step: int, weights: dict[str, torch.Tensor]) -> None:
        """How good are the weights after ``step`` steps? Waits for the answer before."""
        self.take_answer(wait=True)
        self._under_way = step, self._validator.ask(weights)
        self.scores[step] = None

    def take_answer(self, *, wait: bool) -> None:
        """Log the answer, where there is one."""
        if self._under_way is None:
            return
        step, ticket = self._under_way
        answer = self._validator.answer(ticket, wait=wait)
        if answer is None:
            return
        self._under_way = None
        if isinstance(answer, str):
            del self.scores[step]
            self._say(f"the model after step {step} was not validated: {answer}")
            return
        self.scores[step] = answer[SCORE]
        self._log.write(step, answer)
        primary = {f"val/{name}/{metric}" for name, metric in PRIMARY.items()} | {SCORE}
        told = [f"{name.removeprefix('val/')} {value:.4f}" for name, value in answer.items() if name in primary]
        self._say(f"validation after step {step}: {', '.join(told)}")
