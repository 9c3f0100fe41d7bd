"""How far a run is, and what each of its steps reads: which examples, at which rate, and how much of the prefix.

What varies from step to step is a function of the seed and the step alone, drawn for the whole step before the
processes share it.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefixtune.data.tokenized import TokenizedExample, epoch_batches
from prefixtune.prefix.geometry import Site
from prefixtune.training.beside import ALL_RATE, ALONE_RATE
from prefixtune.training.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, total_steps: int) -> float:
    """Linear warm-up, then linear decay to zero.

    >>> config = TrainConfig(learning_rate=1.0, warmup_steps=2)
    >>> [learning_rate(config, step, 6) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]

    Args:
        config: The run.
        step: From 1.
        total_steps: Of the whole run.
    """
    peak = config.peak_learning_rate
    warmup = min(config.warmup_steps, total_steps // 2)
    if step <= warmup:
        return peak * step / warmup
    return peak * (total_steps - step + 1) / (total_steps - warmup)


def optimizer_steps(
    config: TrainConfig, examples: Sequence[TokenizedExample], epoch: int
) -> Iterator[list[list[TokenizedExample]]]:
    """The batches of every optimizer step of an epoch; they depend on the seed and the epoch alone."""
    batches = epoch_batches(
        examples,
        batch_size=config.batch_size,
        targets_per_source=config.targets_per_source,
        seed=config.seed,
        epoch=epoch,
    )
    while step := list(itertools.islice(batches, config.gradient_accumulation)):
        yield step


def count_steps(config: TrainConfig, examples: Sequence[TokenizedExample]) -> int:
    """The optimizer steps of an epoch; where conversations make them differ, of the first."""
    return sum(1 for _ in optimizer_steps(config, examples, epoch=0))


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


_WHOLE_SHARE = 0.25
"""Nested: share of the groups that are trained with the whole prefix; the others' lengths are drawn."""


def vary(
    config: TrainConfig,
    step: int,
    batches: Sequence[Sequence[TokenizedExample]],
    lengths: Mapping[Site, int],
    *,
    one_length: bool,
) -> list[list[TokenizedExample]]:
    """The batches of an optimizer step, with what of the prefix each group sees.

    Args:
        config: The run.
        step: Counted from 1.
        batches: Of the whole step, in all processes.
        lengths: P at each site of the prefix.
        one_length: The groups of a batch cannot have prefixes of different lengths.
    """
    longest = max(lengths.values(), default=0)
    varied = [list(groups) for groups in batches]
    lengths_drawn, hidden_drawn = (random.Random(f"{config.seed}/{step}/{name}") for name in ("nested", "dropout"))
    for groups in varied if longest > 1 else ():
        if config.nested:
            drawn = nested_lengths(lengths_drawn, longest, 1 if one_length else len(groups))
            groups[:] = [
                replace(group, front=group.front._replace(length=drawn[index % len(drawn)]))
                for index, group in enumerate(groups)
            ]
        if config.prefix_dropout:
            for index, group in enumerate(groups):
                dropped = dropped_positions(hidden_drawn, longest, config.prefix_dropout)
                groups[index] = replace(group, hidden=tuple(sorted({*group.hidden, *dropped})))
    return varied


def nested_lengths(rng: random.Random, longest: int, count: int) -> list[int]:
    """Lengths of the prefix for the groups of a batch, so that every length is trained: long ones with short ones.

    A quarter is the whole prefix, which would else be rare; the others are even over log p (a position more changes a
    short prefix much and a long one little). One draw of `count` covers the range evenly: each group has its own part.

    Args:
        rng: Draws.
        longest: P.
        count: How many.
    """
    parts = [(index + rng.random()) / count for index in range(count)]
    rng.shuffle(parts)
    rest = 1 - _WHOLE_SHARE
    return [longest if part >= rest else min(longest, int((longest + 1) ** (part / rest))) for part in parts]


def dropped_positions(rng: random.Random, length: int, rate: float) -> tuple[int, ...]:
    """Positions of a prefix that a group does not see: each with probability `rate`, but never the first.

    The first position takes the attention that nothing else wants; without it a group would see another kind of prefix.
    So one position is always left.
    """
    return tuple(position for position in range(1, length) if rng.random() < rate)


def variation_facts(config: TrainConfig, num_beside: int | None = None) -> dict[str, Any]:
    """What a log or header says of it; empty: nothing varies.

    Args:
        config: The run.
        num_beside: How many others there are; None: it is left out.
    """
    facts: dict[str, Any] = {}
    if config.nested:
        facts["nested"] = True
    if config.prefix_dropout:
        facts["prefix_dropout"] = config.prefix_dropout
    if config.beside:
        facts["beside"] = {"alone": ALONE_RATE, "all": ALL_RATE, "most": config.beside_most, "positions": "shared"}
        if num_beside is not None:
            facts["beside"]["others"] = num_beside
    return facts
