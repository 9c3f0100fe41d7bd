"""The sets made here: the same everywhere, disjoint, and read by their tasks."""

from __future__ import annotations

import hashlib

import pytest

from prefixtune.data import TASKS, Example, read_task
from prefixtune.errors import ConfigError

SETS = {
    "toy": ((320, 40), "1de3b2d25e6ec384"),
    "toy_labels": ((400, 100), "7b01cc3bc0c33846"),
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
