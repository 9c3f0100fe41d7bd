"""The order of an epoch: which targets of which examples are in each batch.

It is planned with numbers alone, so that a resumed run finds its place without making one example.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prefixtune.data.tokenized import TokenizedExample, target_counts, turn_counts


class TargetGroup(NamedTuple):
    """One example with some of its targets, by their indices."""

    example: int
    targets: tuple[int, ...]


def epoch_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, targets_per_source: int, seed: int | None, epoch: int = 0
) -> Iterator[list[TokenizedExample]]:
    """One pass over all targets, as lists of examples to `pack`; see `plan_epoch`.

    Args:
        examples: All examples.
        batch_size: Targets per batch.
        targets_per_source: Most targets of one source in a group.
        seed: None: nothing is shuffled.
        epoch: Which pass.
    """
    plan = plan_epoch(
        target_counts(examples),
        turn_counts(examples),
        batch_size=batch_size,
        targets_per_source=targets_per_source,
        seed=seed,
        epoch=epoch,
    )
    return (take(examples, batch) for batch in plan)


def take(examples: Sequence[TokenizedExample], batch: Sequence[TargetGroup]) -> list[TokenizedExample]:
    """The examples of a planned batch, each with its targets there."""
    return [examples[group.example].with_targets(group.targets) for group in batch]


def plan_epoch(
    counts: Sequence[int],
    turns: Sequence[int] | None = None,
    *,
    batch_size: int,
    targets_per_source: int,
    seed: int | None,
    epoch: int = 0,
) -> Iterator[list[TargetGroup]]:
    """One pass over all targets, as batches of groups.

    Every target comes once. A source's targets are divided into groups of at most `targets_per_source`, the groups are
    shuffled, and a batch takes groups until it has `batch_size` targets. The order depends on seed and epoch alone.

    A conversation counts as many targets as it has turns and is never divided: a batch may be smaller for it, and is
    larger where the conversation alone has more turns.

    Args:
        counts: The targets of each example.
        turns: The turns of each example; 0: it is no conversation. None: none is.
        batch_size: Targets per batch.
        targets_per_source: Most targets of one source in a group.
        seed: None: nothing is shuffled.
        epoch: Which pass.
    """
    rng = None if seed is None else random.Random(f"{seed}/{epoch}")
    most = min(batch_size, targets_per_source)
    groups: list[TargetGroup] = []
    for example, count in enumerate(counts):
        targets = list(range(count))
        if rng is not None:
            rng.shuffle(targets)
        groups += [TargetGroup(example, tuple(targets[start : start + most])) for start in range(0, count, most)]
    if rng is not None:
        rng.shuffle(groups)
    batch: list[TargetGroup] = []
    room = batch_size
    for group in groups:
        size = turns[group.example] if turns is not None else 0
        if size > room and batch:
            yield batch
            batch, room = [], batch_size
        if not size and len(group.targets) > room:
            # Fill the batch with a part of the group; the rest begins the next batch.
            if room > 0:
                batch.append(group._replace(targets=group.targets[:room]))
            yield batch
            group, batch, room = group._replace(targets=group.targets[max(room, 0) :]), [], batch_size
        batch.append(group)
        room -= size or len(group.targets)
    if batch:
        yield batch
