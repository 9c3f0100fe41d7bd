"""The toy tasks with exact answers: reproducible, disjoint, by their rules, and scored by exact match."""

from __future__ import annotations

import hashlib
import re

import pytest

from prefixtune.data import TASKS, Example, read_task
from prefixtune.data.toy.skills import SKILLS, make_skill
from prefixtune.errors import ConfigError
from prefixtune.evaluation.metrics import compute


def pairs(examples: list[Example]) -> list[tuple[str, str]]:
    return [(example.source, example.targets[0]) for example in examples]


def words(examples: list[Example]) -> set[str]:
    return {word for source, _ in pairs(examples) for word in re.findall("[A-Za-z]+", source)}


@pytest.mark.parametrize("name", SKILLS)
def test_parts_are_disjoint_and_the_task_reads_them(name: str) -> None:
    parts = make_skill(name)
    assert [len(part) for part in parts] == [320, 80, 100]
    assert len({example.source for part in parts for example in part}) == 500
    assert tuple(read_task(f"toy_{name}", part) for part in TASKS[f"toy_{name}"].parts) == parts
    assert make_skill(name, seed=8)[0] != parts[0]
    # What a held-out example is made of occurs in training.
    if name != "base":
        assert words(parts[2]) <= words(parts[0])


def test_the_default_sets_never_change() -> None:
    text = "\n".join("\t".join(pair) for name in SKILLS for part in make_skill(name) for pair in pairs(part))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "5b6cee54a02d0bb6"


def test_answers_follow_the_rules() -> None:
    for source, target in pairs(make_skill("base")[2]):
        one, other = source.split(" + ")
        assert int(one, 7) + int(other, 7) == int(target, 7)
    mapping = {a: b for source, target in pairs(make_skill("mapping")[0]) for a, b in zip(source, target, strict=True)}
    assert sorted(mapping.values()) == sorted(mapping.keys())
    assert all(letter == " " or letter != new for letter, new in mapping.items())
    for source, target in pairs(make_skill("mapping", seed=3)[2]):
        assert "".join(mapping[letter] for letter in source) == target
    assert all(source == target for source, target in pairs(make_skill("copy")[2]))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"name": "mapp"}, "no toy task 'mapp'"),
        ({"name": "copy", "train": 0}, "train is 0; allowed: 1 to 10,000"),
        ({"name": "copy", "seed": -1}, "seed is -1"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make_skill(**arguments)
    with pytest.raises(ConfigError, match="one of train, dev, held_out; got 'test'"):
        read_task("toy_copy", "test")


def test_exact_match_is_the_share_of_equal_outputs() -> None:
    outputs, references = ["a b", " a  b ", "A b", ""], [["x", "a b"], ["a b"], ["a b"], ["a b"]]
    score = compute(outputs, references, metrics=["exact_match"])["exact_match"]
    assert (score.score, score.higher_is_better) == (50.0, True)
