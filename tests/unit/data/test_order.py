"""The order of an epoch equals that of the version that shuffled lists of objects, so that old runs resume."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from hypothesis import given
from hypothesis import strategies as st

from prefixtune.data.order import epoch_batches, plan_epoch
from prefixtune.data.tokenized import TokenizedExample


def old_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, targets_per_source: int, seed: int | None, epoch: int
) -> Iterator[list[TokenizedExample]]:
    rng = None if seed is None else random.Random(f"{seed}/{epoch}")
    size = min(batch_size, targets_per_source)
    groups: list[TokenizedExample] = []
    for example in examples:
        targets = list(range(len(example.targets)))
        if rng is not None:
            rng.shuffle(targets)
        groups.extend(example.with_targets(targets[start : start + size]) for start in range(0, len(targets), size))
    if rng is not None:
        rng.shuffle(groups)
    batch: list[TokenizedExample] = []
    room = batch_size
    for group in groups:
        if len(group.targets) > room:
            if room:
                batch.append(group.with_targets(range(room)))
            yield batch
            group, batch, room = group.with_targets(range(room, len(group.targets))), [], batch_size
        batch.append(group)
        room -= len(group.targets)
    if batch:
        yield batch


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=30),
    st.integers(1, 12),
    st.integers(1, 12),
    st.one_of(st.none(), st.integers(0, 3)),
    st.integers(0, 3),
)
def test_the_order_is_that_of_earlier_versions(
    counts: list[int], batch_size: int, targets_per_source: int, seed: int | None, epoch: int
):
    examples = [
        TokenizedExample((source,), tuple((source, number) for number in range(count)))
        for source, count in enumerate(counts)
    ]
    plan = {"batch_size": batch_size, "targets_per_source": targets_per_source, "seed": seed, "epoch": epoch}
    expected = list(old_batches(examples, **plan))
    assert list(epoch_batches(examples, **plan)) == expected


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 4)), min_size=1, max_size=30),
    st.integers(1, 6),
    st.integers(0, 3),
)
def test_conversations_are_never_divided_and_count_as_their_turns(
    examples: list[tuple[int, int]], batch_size: int, seed: int
):
    turns = [turn_count for turn_count, _ in examples]
    counts = [1 if turn_count else count for turn_count, count in examples]
    batches = list(plan_epoch(counts, turns, batch_size=batch_size, targets_per_source=2, seed=seed))
    seen = [(group.example, target) for batch in batches for group in batch for target in group.targets]
    assert sorted(seen) == [(example, target) for example, count in enumerate(counts) for target in range(count)]
    for batch in batches:
        size = sum(turns[group.example] or len(group.targets) for group in batch)
        assert 1 <= size <= batch_size or len(batch) == 1
