"""Many examples in files: the same list as in memory, whatever is merged, selected, limited or changed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixtune.data import cache, stored_examples
from prefixtune.data.examples import Example, Message, limit_targets
from prefixtune.data.stored_examples import (
    StoredExamples,
    change_examples,
    count_answers,
    distinct_sources,
    first_targets,
    gather,
    gather_file,
    has_messages,
    has_targets,
    select,
    source_ids,
)

MESSAGES = st.sampled_from(
    [
        (),
        (),
        (Message("user", "a"),),
        (Message("system", "s"), Message("user", "a")),
        (Message("user", "a"), Message("assistant", "b"), Message("user", "a")),
    ]
)
FIELDS = st.fixed_dictionaries(
    {
        "source": st.sampled_from(["a", "b", "c", "", "Zoë \u2028 \ud800"]),
        "targets": st.lists(st.sampled_from(["x", "y", "ü\n"]), max_size=3).map(tuple),
        "fields": st.dictionaries(
            st.sampled_from(["k", "l"]),
            st.integers() | st.lists(st.text(max_size=2), max_size=2) | st.tuples(st.text(max_size=2)),
        ),
        "groups": st.dictionaries(st.just("g"), st.text(max_size=2)),
        "messages": MESSAGES,
    }
)
LISTS = st.lists(FIELDS, max_size=12)


def make(fields: list[dict[str, Any]]) -> list[Example]:
    return [Example(**some) for some in fields]


def everything(examples: Sequence[Example]) -> list[dict[str, Any]]:
    """All of the examples, also what does not count when they are compared."""
    return [dataclasses.asdict(example) for example in examples]


def to_file(examples: Sequence[Example], *, merge: bool = False) -> StoredExamples:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_examples, "FEW", 0)
        patch.setattr(stored_examples, "_BLOCK", 3)
        found = gather(iter(examples), merge=merge)
    assert isinstance(found, StoredExamples)
    return found


@given(LISTS.filter(bool), st.booleans())
def test_examples_in_a_file_are_those_in_a_list(fields: list[dict[str, Any]], merge: bool):
    examples = make(fields)
    expected = gather(examples, merge=merge)
    assert isinstance(expected, list)
    found = to_file(examples, merge=merge)
    assert everything(found) == everything(expected)
    assert everything([found[index] for index in range(len(found))]) == everything(expected)
    assert everything(found[1:5:2]) == everything(expected[1:5:2])
    assert has_targets(found).tolist() == has_targets(expected).tolist()
    assert has_messages(found) == has_messages(expected)
    assert count_answers(found) == count_answers(expected)
    assert distinct_sources(found).tolist() == distinct_sources(expected).tolist()
    _, first, groups = np.unique(source_ids(found), return_index=True, return_inverse=True)
    _, expected_first, expected_groups = np.unique(source_ids(expected), return_index=True, return_inverse=True)
    assert first[groups].tolist() == expected_first[expected_groups].tolist()


@given(LISTS.filter(bool), st.integers(0, 12), st.integers(0, 9), st.integers(0, 3))
def test_a_selection_and_a_limit_are_those_of_a_list(
    fields: list[dict[str, Any]], limit: int, second_limit: int, seed: int
):
    examples = make(fields)
    found, kept = first_targets(to_file(examples), limit), limit_targets(examples, limit)
    assert everything(found) == everything(kept)
    assert has_targets(found).tolist() == has_targets(kept).tolist()
    chosen = np.array(sorted(random.Random(seed).sample(range(len(kept)), (len(kept) + 1) // 2)), np.int64)
    expected = limit_targets([kept[index] for index in chosen.tolist()], second_limit)
    assert everything(first_targets(select(found, chosen), second_limit)) == everything(expected)
    assert everything(first_targets(select(kept, chosen), second_limit)) == everything(expected)


def test_a_change_is_made_when_an_example_is_asked_for():
    examples = [Example("a", ("x",)), Example("b", ("y", "z"))]

    def upper(example: Example) -> Example:
        return dataclasses.replace(example, targets=tuple(target.upper() for target in example.targets))

    found = change_examples(
        change_examples(to_file(examples), upper), lambda e: dataclasses.replace(e, source=e.source * 2)
    )
    assert list(found) == [Example("aa", ("X",)), Example("bb", ("Y", "Z"))]
    assert change_examples(examples, upper) == [Example("a", ("X",)), Example("b", ("Y", "Z"))]


def test_an_index_outside_is_refused():
    found = to_file([Example("a", ("x",))])
    assert found[-1] == found[0]
    for index in (1, -2):
        with pytest.raises(IndexError):
            found[index]


def test_the_digest_tells_examples_apart():
    examples = [Example(letter, ("x", "y")) for letter in "abc"]
    found = to_file(examples)
    others = [
        to_file(examples[:2]),
        to_file([*examples[:2], Example("c", ("x", "z"))]),
        select(found, np.array([0, 2])),
        first_targets(found, 5),
    ]
    digests = {some.digest for some in [found, *others] if isinstance(some, StoredExamples)}
    assert len(digests) == 5
    assert to_file(examples).digest == found.digest


@pytest.fixture
def large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(stored_examples, "KEPT_BYTES", 1)
    path = tmp_path / "data.jsonl"
    path.write_text("a\nb\na\n")
    return path


class Reader:
    """Counts how often a file is read."""

    def __init__(self, path: Path) -> None:
        self.path, self.times = path, 0

    def __call__(self) -> Iterator[Example]:
        self.times += 1
        return (Example(line, ("x",)) for line in self.path.read_text().split())


def test_a_large_file_is_read_once(large_file: Path):
    read = Reader(large_file)
    first = gather_file(large_file, read, merge=True, form="letters")
    assert list(first) == [Example("a", ("x", "x")), Example("b", ("x",))]
    copy = large_file.with_name("copy.jsonl")
    copy.write_bytes(large_file.read_bytes())
    again = gather_file(copy, read, merge=True, form="letters")
    assert (list(again), read.times) == (list(first), 1)
    # Another way to read it, and another content, are something else.
    assert len(gather_file(large_file, read, merge=False, form="letters")) == 3
    gather_file(large_file, read, merge=True, form="words")
    large_file.write_text("c")
    assert list(gather_file(large_file, read, merge=True, form="letters")) == [Example("c", ("x",))]
    assert read.times == 4


def test_nothing_is_kept_where_nothing_should_be(large_file: Path, monkeypatch: pytest.MonkeyPatch):
    read = Reader(large_file)
    assert isinstance(gather_file(large_file, read, keep=False), list)
    assert not cache.data_folder().exists()
    monkeypatch.setenv(cache.SWITCH, "0")
    assert len(gather_file(large_file, read)) == 3
    assert not cache.data_folder().exists()
