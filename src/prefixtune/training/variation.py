"""What varies from step to step beside the data: which positions of the prefix a group sees, and how many there are.

Every draw is a function of the seed and the step alone, made for the whole step before the processes share it.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefixtune.data.encoding import TokenizedExample
from prefixtune.prefix.geometry import Site
from prefixtune.training.beside import ALL_RATE, ALONE_RATE
from prefixtune.training.config import TrainConfig

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
    if config.nested and longest > 1:
        rng = random.Random(f"{config.seed}/{step}/nested")
        for groups in varied:
            drawn = nested_lengths(rng, longest, 1 if one_length else len(groups))
            groups[:] = [
                replace(group, front=group.front._replace(length=drawn[index % len(drawn)]))
                for index, group in enumerate(groups)
            ]
    if config.prefix_dropout and longest > 1:
        rng = random.Random(f"{config.seed}/{step}/dropout")
        for groups in varied:
            groups[:] = [
                replace(
                    group,
                    hidden=tuple(sorted({*group.hidden, *dropped_positions(rng, longest, config.prefix_dropout)})),
                )
                for group in groups
            ]
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
