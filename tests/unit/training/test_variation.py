"""What varies from step to step: dropped positions and nested lengths, by the seed and the step alone."""

import random
from collections import Counter

import prefixtune as pt
from prefixtune.data.encoding import TokenizedExample
from prefixtune.training.schedule import dropped_positions, nested_lengths, vary

GROUPS = [TokenizedExample((1, 2), ((3,),), hidden=(0, 7)) for _ in range(12)]


def varied(step=1, *, seed=0, one_length=False, **options):
    config = pt.TrainConfig(seed=seed, **options)
    return vary(config, step, [GROUPS, GROUPS[:3]], {"encoder": 20, "cross": 5}, one_length=one_length)


def test_each_group_misses_its_own_share_and_what_it_missed_before():
    steps = [varied(step, prefix_dropout=0.3) for step in range(1, 101)]
    groups = [group for batches in steps for batch in batches for group in batch]
    assert all({0, 7} <= set(group.hidden) <= set(range(20)) for group in groups)
    counts = Counter(position for group in groups for position in group.hidden)
    # 1,500 draws each: 0.3 within six standard deviations of it.
    assert all(abs(counts[position] / len(groups) - 0.3) < 0.07 for position in range(1, 20) if position != 7)
    assert len({group.hidden for group in groups}) > 1000


def test_the_first_position_always_stays():
    rng = random.Random(0)
    drawn = [dropped_positions(rng, 3, 0.99) for _ in range(200)]
    assert max(map(len, drawn)) == 2
    assert all(0 not in positions for positions in drawn)
    assert varied(prefix_dropout=0.0)[0] == GROUPS


def test_lengths_cover_the_range_in_every_step():
    """A quarter is the whole prefix, and each octave below has the same share of the rest."""
    rng = random.Random(0)
    drawn = [nested_lengths(rng, 63, 12) for _ in range(500)]
    assert all(sum(length == 63 for length in lengths) in (3, 4) for lengths in drawn)
    rest = [length for lengths in drawn for length in lengths if length < 63]
    octaves = Counter(length.bit_length() for length in rest)
    assert set(rest) == set(range(1, 63))
    assert all(abs(octaves[bits] / len(rest) - 1 / 6) < 0.02 for bits in range(1, 7))
    # Stratified: no step trains long prefixes alone.
    assert all(min(lengths) <= 2 for lengths in drawn)


def test_one_length_for_a_batch_where_rows_cannot_differ():
    for step in range(1, 20):
        first, second = varied(step, nested=True, one_length=True)
        assert len({group.front.length for group in first}) == len({group.front.length for group in second}) == 1
    lengths = {varied(step, nested=True, one_length=True)[0][0].front.length for step in range(1, 100)}
    assert {1, 20} < lengths
    assert len({group.front.length for group in varied(nested=True)[0]}) > 6


def test_draws_depend_on_the_seed_and_the_step_alone():
    options = {"nested": True, "prefix_dropout": 0.2}
    random.seed(3)
    once = varied(5, **options)
    random.seed(4)
    assert varied(5, **options) == once
    assert varied(6, **options) != once != varied(5, seed=1, **options)
    lengths = [group.front.length for group in once[0]]
    assert [group.front.length for group in varied(5, nested=True)[0]] == lengths
