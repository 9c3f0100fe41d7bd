"""Which examples each step of a run reads, in which order, and at which learning rate."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from prefixtune.data.tokenized import TokenizedExample, epoch_batches
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
    if any(example.turns for example in examples):
        return sum(1 for _ in optimizer_steps(config, examples, epoch=0))
    # Every batch but the last is full.
    batches = -(-sum(len(example.targets) for example in examples) // config.batch_size)
    return -(-batches // config.gradient_accumulation)
