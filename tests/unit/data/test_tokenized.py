"""Tokenized examples in arrays: the same examples, the same figures and the same hash as those of objects."""

from __future__ import annotations

import hashlib
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixtune.data import tokenized
from prefixtune.data.tokenized import (
    TokenizedDataset,
    TokenizedExample,
    TokenTable,
    any_hidden,
    hash_tokens,
    longest_text,
    target_counts,
    turn_counts,
)

IDS = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5).map(tuple)
# Made within the tests: the check of types within the constructor draws random items, which strategies may not.
PLAIN = st.fixed_dictionaries({"prompt": IDS, "targets": st.lists(IDS, max_size=4).map(tuple)})
LABELLED = st.fixed_dictionaries(
    {"prompt": IDS, "targets": st.tuples(IDS), "label_positions": st.lists(st.integers(0, 4), max_size=3).map(tuple)}
)
CONVERSATION = st.fixed_dictionaries(
    {
        "prompt": IDS,
        "targets": st.tuples(IDS),
        "turns": st.lists(st.tuples(st.integers(0, 4), st.integers(5, 9)), max_size=3).map(tuple),
    }
)
LISTS = st.one_of(*(st.lists(kind, max_size=9) for kind in (PLAIN, LABELLED, CONVERSATION)))


def make(fields: list[dict[str, Any]]) -> list[TokenizedExample]:
    return [TokenizedExample(**some) for some in fields]


def sha(examples: Any) -> str:
    total = hashlib.sha256()
    hash_tokens(examples, total.update)
    return total.hexdigest()


@given(LISTS)
def test_a_table_holds_the_examples_and_gives_their_figures(fields: list[dict[str, Any]]):
    examples = make(fields)
    table = TokenTable.of(examples)
    assert list(table) == examples
    assert [table[index] for index in range(len(table))] == examples
    assert table[1:7:2] == tuple(examples[1:7:2])
    assert table[-1:] == tuple(examples[-1:])
    objects, arrays = TokenizedDataset(tuple(examples), 0), TokenizedDataset(table, 0)
    assert (arrays.num_targets, arrays.longest_target) == (objects.num_targets, objects.longest_target)
    assert longest_text(table) == longest_text(examples)
    assert target_counts(table) == target_counts(examples)
    assert turn_counts(table) == turn_counts(examples)
    assert not any_hidden(table)


def test_an_index_outside_is_refused():
    table = TokenTable.of([TokenizedExample((1,), ((2,),))])
    assert table[-1] == table[0]
    for index in (1, -2):
        with pytest.raises(IndexError):
            table[index]


@given(LISTS, st.integers(1, 4))
def test_the_hash_is_that_of_earlier_versions(fields: list[dict[str, Any]], chunk: int):
    examples = make(fields)
    expected = hashlib.sha256()
    for example in examples:
        for ids in (example.prompt, *example.targets, ()):
            expected.update(array("q", (len(ids), *ids)).tobytes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenized, "_CHUNK", chunk)
        assert sha(TokenTable.of(examples)) == sha(examples) == expected.hexdigest()
