"""The sets made here: the same everywhere, disjoint, and read by their tasks."""

from __future__ import annotations

import hashlib

import pytest

from prefixtune.data import TASKS, Example, read_task
from prefixtune.errors import ConfigError

SETS = {
    "toy": ((320, 40), "1de3b2d25e6ec384"),
    "toy_labels": ((400, 100), "7b01cc3bc0c33846"),
    "toy_tags": ((300, 60), "601e667cd232408c"),
    "toy_mapping": ((320, 80, 100), "1ee4da9091182c9c"),
    "toy_base": ((320, 80, 100), "1c791c1a42920f61"),
    "toy_copy": ((320, 80, 100), "f130e181a85a569e"),
}


def parts_of(name: str) -> list[list[Example]]:
    return [read_task(name, part) for part in TASKS[name].parts]


@pytest.mark.parametrize("name", SETS)
def test_the_sets_never_change_and_their_parts_are_disjoint(name: str) -> None:
    sizes, digest = SETS[name]
    parts = parts_of(name)
    assert tuple(map(len, parts)) == sizes
    examples = [example for part in parts for example in part]
    assert len({example.source for example in examples}) == sum(sizes)
    text = "\n".join("\t".join((example.source, *example.targets)) for example in examples)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest


def test_a_set_made_here_has_parts_and_no_columns() -> None:
    for options in ({"path": "heldout"}, {"path": "train", "source": "x"}):
        with pytest.raises(ConfigError):
            read_task("toy", **options)


def test_answers_follow_the_rules() -> None:
    for example in parts_of("toy_base")[2]:
        one, other = example.source.split(" + ")
        assert int(one, 7) + int(other, 7) == int(example.targets[0], 7)
    train, _, held_out = parts_of("toy_mapping")
    mapping = {a: b for one in train for a, b in zip(one.source, one.targets[0], strict=True)}
    assert all("".join(mapping[letter] for letter in one.source) == one.targets[0] for one in held_out)
    assert all(one.source == one.targets[0] for one in parts_of("toy_copy")[2])
