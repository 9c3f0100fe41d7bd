"""Samples of a data set, the same for every method: some targets to train on, some to choose by, some to score.

Knows nothing of models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Sequence

from prefixtune.data import Example
from prefixtune.errors import DataError

__all__ = ["sample_examples", "sample_pairs", "sample_sources", "sample_targets"]


def sample_targets(examples: Sequence[Example], count: int, by: str, seed: str) -> list[Example]:
    """A sample of `count` targets with their sources; 0: all of them, as they are.

    Args:
        examples: To draw from.
        count: Targets wanted.
        by: `pairs` or `sources`.
        seed: Any text.

    Raises:
        DataError: There are fewer.
    """
    available = sum(len(example.targets) for example in examples)
    if count > available:
        raise DataError(
            f"{count} targets are to be drawn, but there are {available}.", hint="lower sizes, or take 0 for all."
        )
    if not count:
        return list(examples)
    return (sample_pairs if by == "pairs" else sample_sources)(examples, count, seed)


def sample_pairs(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """`count` pairs of a source and one of its targets, drawn without replacement; in the set's order.

    >>> sample_pairs([Example("a", ("1", "2", "3")), Example("b", ("4",))], 4, "any")[0].targets
    ('1', '2', '3')
    """
    pairs = [(number, place) for number, example in enumerate(examples) for place in range(len(example.targets))]
    kept: dict[int, list[int]] = {}
    for number, place in sorted(random.Random(seed).sample(pairs, count)):
        kept.setdefault(number, []).append(place)
    return [
        dataclasses.replace(examples[number], targets=tuple(examples[number].targets[place] for place in places))
        for number, places in kept.items()
    ]


def sample_sources(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """Sources with all of their targets, drawn until there are `count` targets; the last may lose some."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    kept: list[Example] = []
    room = count
    for number in order:
        example = examples[number]
        if room <= 0:
            break
        if example.targets:
            kept.append(dataclasses.replace(example, targets=example.targets[:room]))
            room -= len(example.targets)
    return kept


def sample_examples(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """`count` examples, whole, in the set's order; 0, or more than there are: all."""
    if not 0 < count < len(examples):
        return list(examples)
    return [examples[number] for number in sorted(random.Random(seed).sample(range(len(examples)), count))]


def digest_examples(examples: Sequence[Example]) -> str:
    """Of what runs learn from and are scored by, wherever it was read from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.source, *example.targets]).encode())
    return digest.hexdigest()[:16]
