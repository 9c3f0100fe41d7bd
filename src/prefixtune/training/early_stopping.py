"""How far a run is, the best development loss so far, and whether the run goes on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any


@dataclass
class TrainState:
    """How far a run is.

    Attributes:
        total_steps: Optimizer steps that the configuration plans.
        patience: Evaluations without a better loss after which the run ends; 0: it never ends by them.
        step: Optimizer steps taken.
        best_loss: Lowest development loss per token; NaN before the first evaluation.
        best_step: The step that it was measured at.
        misses: Evaluations since then.
    """

    total_steps: int
    patience: int = 0
    step: int = 0
    best_loss: float = math.nan
    best_step: int = 0
    misses: int = 0

    @property
    def is_over(self) -> bool:
        """Whether all steps are taken, or the patience is used up."""
        return self.step >= self.total_steps or 0 < self.patience <= self.misses

    def observe(self, loss: float) -> bool:
        """Take in an evaluation; returns whether the prefix is the best so far.

        Args:
            loss: The development loss; NaN: there are no such data, and the latest prefix is the best.
        """
        better = not loss >= self.best_loss
        self.misses = 0 if better else self.misses + 1
        if better:
            self.best_loss, self.best_step = loss, self.step
        return better

    def best(self) -> dict[str, Any]:
        """The best evaluation, as events and states have it."""
        return {"best_loss": finite_or_none(self.best_loss), "best_step": self.best_step}


def finite_or_none(value: float) -> float | None:
    """The value, with None for NaN, which JSON does not have."""
    return None if math.isnan(value) else value
