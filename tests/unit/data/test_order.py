"""The order of an epoch: conversations stay whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from prefixtune.data.order import plan_epoch


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
