"""The sets made here: reproducible, disjoint, and read by their tasks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import pytest

from prefixtune.data import TASKS, Example, read_task
from prefixtune.data.toy.classification import make_toy_labels
from prefixtune.data.toy.skills import SKILLS, make_skill
from prefixtune.data.toy.table_to_text import make_toy
from prefixtune.data.toy.tagging import make_toy_tags
from prefixtune.errors import ConfigError


def pairs(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.source, example.targets[0]) for example in examples]


@pytest.mark.parametrize(
    ("name", "make", "sizes", "digest"),
    [
        ("toy", make_toy, (320, 40), "1de3b2d25e6ec384"),
        ("toy_labels", make_toy_labels, (400, 100), "7b01cc3bc0c33846"),
        ("toy_tags", make_toy_tags, (300, 60), "601e667cd232408c"),
    ],
)
def test_the_default_sets_never_change_and_their_tasks_read_them(
    name: str, make: Callable[..., tuple[list[Example], list[Example]]], sizes: tuple[int, int], digest: str
):
    train, held_out = make()
    assert (len(train), len(held_out)) == sizes
    text = "\n".join("\t".join((example.source, *example.targets)) for example in train + held_out)
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == digest
    assert len({example.source for example in train + held_out}) == sum(sizes)
    assert make(seed=8)[0] != train
    assert tuple(read_task(name, part) for part in TASKS[name].parts) == (train, held_out)
    with pytest.raises(ConfigError, match="did you mean 'held_out'"):
        read_task(name, "heldout")
    with pytest.raises(ConfigError, match="takes no source"):
        read_task(name, "train", source="x")


def test_skills_never_change() -> None:
    text = "\n".join("\t".join(pair) for name in SKILLS for part in make_skill(name) for pair in pairs(part))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5b6cee54a02d0bb6"


@pytest.mark.parametrize("name", SKILLS)
def test_a_skills_parts_are_disjoint_and_its_task_reads_them(name: str) -> None:
    parts = make_skill(name)
    assert [len(part) for part in parts] == [320, 80, 100]
    assert len({example.source for part in parts for example in part}) == 500
    assert tuple(read_task(f"toy_{name}", part) for part in TASKS[f"toy_{name}"].parts) == parts
    assert make_skill(name, seed=8)[0] != parts[0]


def test_answers_follow_the_rules() -> None:
    for source, target in pairs(make_skill("base")[2]):
        one, other = source.split(" + ")
        assert int(one, 7) + int(other, 7) == int(target, 7)
    mapping = {a: b for source, target in pairs(make_skill("mapping")[0]) for a, b in zip(source, target, strict=True)}
    for source, target in pairs(make_skill("mapping", seed=3)[2]):
        assert "".join(mapping[letter] for letter in source) == target
    assert all(source == target for source, target in pairs(make_skill("copy")[2]))
