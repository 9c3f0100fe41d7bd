"""Samples: of the right size, without repeats, the same for whoever draws them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixtune.data import Example
from prefixtune.errors import DataError
from prefixtune.studies.data import sample_examples, sample_targets

SET = [Example(f"s{n}", tuple(f"t{n}.{k}" for k in range(n % 4 + 1)), {"n": n}, {"g": str(n)}) for n in range(12)]
TOTAL = sum(len(example.targets) for example in SET)
BY_SOURCE = {example.source: example for example in SET}


def pairs(sample: list[Example]) -> list[tuple[str, str]]:
    return [(example.source, target) for example in sample for target in example.targets]


@given(count=st.integers(1, TOTAL), by=st.sampled_from(["pairs", "sources"]), seed=st.text(max_size=5))
def test_a_sample_has_its_size_and_repeats_nothing(count: int, by: str, seed: str):
    sample = sample_targets(SET, count, by, seed)
    drawn = pairs(sample)
    assert len(drawn) == len(set(drawn)) == count
    assert set(drawn) <= set(pairs(SET))
    assert len({example.source for example in sample}) == len(sample), "a source stands in it once"
    assert all(example.groups == BY_SOURCE[example.source].groups for example in sample)
    assert all(example.fields == BY_SOURCE[example.source].fields for example in sample)
    assert sample_targets(SET, count, by, seed) == sample
    if by == "sources":
        cut = [e for e in sample if len(e.targets) < len(BY_SOURCE[e.source].targets)]
        assert len(cut) <= 1, "whole sources, but for the last"


@pytest.mark.parametrize("by", ["pairs", "sources"])
def test_seeds_draw_differently_and_sizes_do_not_depend_on_each_other(by: str):
    assert sample_targets(SET, 9, by, "train/0") != sample_targets(SET, 9, by, "train/1")
    alone = sample_targets(SET, 9, by, "train/0")
    for other in (1, 5, 20, TOTAL):
        sample_targets(SET, other, by, "train/0")
    assert sample_targets(SET, 9, by, "train/0") == alone


def test_pairs_are_drawn_from_everywhere():
    seen = {pair for seed in range(40) for pair in pairs(sample_targets(SET, 5, "pairs", f"train/{seed}"))}
    assert seen == set(pairs(SET))


def test_size_zero_is_the_whole_set():
    assert sample_targets(SET, 0, "pairs", "any") == SET
    assert sorted(pairs(sample_targets(SET, TOTAL, "sources", "any"))) == sorted(pairs(SET))


def test_more_than_there_are():
    with pytest.raises(
        DataError, match=f"a sample of {TOTAL + 1} targets was requested, but there are {TOTAL}"
    ) as error:
        sample_targets(SET, TOTAL + 1, "pairs", "any")
    assert "lower sizes" in error.value.hint


def test_sources_without_a_target_are_not_drawn():
    bare = [Example("bare"), *SET[:2], Example("empty")]
    assert {e.source for seed in range(9) for e in sample_targets(bare, 2, "sources", str(seed))} == {"s0", "s1"}


def test_examples_are_whole_and_in_order():
    sample = sample_examples(SET, 5, "test")
    assert sample == sorted(sample, key=SET.index)
    assert len(sample) == 5
    assert sample_examples(SET, 5, "test") == sample
    assert sample_examples(SET, 5, "other") != sample
    assert sample_examples(SET, 0, "test") == sample_examples(SET, 99, "test") == SET
