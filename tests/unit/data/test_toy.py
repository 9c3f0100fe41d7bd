"""The set made here: reproducible, disjoint, and learnable from its own rules."""

from __future__ import annotations

import hashlib

import pytest

from prefixtune.data import TASKS, Example, read_task
from prefixtune.data.toy.table_to_text import make_toy
from prefixtune.errors import ConfigError


def values(examples: list[Example]) -> dict[str, set[str]]:
    return {field: {example.fields[field] for example in examples} for field in examples[0].fields}


def test_the_default_set_never_changes():
    train, held_out = make_toy()
    assert (len(train), len(held_out)) == (320, 40)
    text = "\n".join("\t".join((example.source, *example.targets)) for example in train + held_out)
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "1de3b2d25e6ec38472ac45e6b1faf13145c41af30b4b1c221270d5ede72ac713"
    )
    assert make_toy() == (train, held_out)
    assert make_toy(seed=8)[0] != train


@pytest.mark.parametrize(("seed", "train", "held_out"), [(7, 320, 40), (0, 20, 200), (3, 2, 62), (1, 1, 0)])
def test_held_out_tables_are_new_combinations_of_known_values(seed: int, train: int, held_out: int):
    training, holding = make_toy(seed, train, held_out)
    sources = [example.source for example in training + holding]
    assert len(set(sources)) == len(sources) == train + held_out
    known = values(training)
    if train >= 20:
        assert {field: len(found) for field, found in known.items()} == {
            "train": 8,
            "to": 8,
            "time": 20,
            "platform": 4,
            "fare": 8,
            "sky": 4,
        }
    for example in holding:
        assert all(value in known[field] for field, value in example.fields.items())


def test_a_notice_follows_from_its_table_alone():
    train, held_out = make_toy()
    sides = {"A": "Alfa", "B": "Bravo", "C": "Charlie", "D": "Delta"}
    for example in train + held_out:
        first, second = example.targets
        assert first != second
        for target in example.targets:
            assert f"the {sides[example.fields['platform']]} side" in target
            assert f"the {example.fields['train']} sails" in target
            assert f" to {example.fields['to']}, " in target
            assert ("a mere" in target) == (int(example.fields["fare"]) < 10)
            assert not any(letter.isdigit() for letter in target)
    closings = {(example.fields["sky"], example.targets[0].split("; ")[1]) for example in train}
    assert len(closings) == len(values(train)["sky"])


@pytest.mark.parametrize(
    ("clock", "words"),
    [
        ("18:00", "Eighteen hundred:"),
        ("19:15", "Nineteen fifteen:"),
        ("20:30", "Twenty thirty:"),
        ("22:45", "Twenty-two forty-five:"),
    ],
)
def test_times_are_written_in_words(clock: str, words: str):
    reported = {example.targets[0].split(" the ")[0] for example in make_toy()[0] if example.fields["time"] == clock}
    assert reported == {words}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train": 0, "held_out": -1}, "train is 0; .*held_out is -1"),
        ({"train": 1, "held_out": 1}, "leave only 0 other combinations"),
        ({"seed": -7}, "seed is -7"),
        ({"train": 10_001}, "allowed: 1 to 10,000"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, int], says: str):
    with pytest.raises(ConfigError, match=says):
        make_toy(**arguments)


def test_the_task_reads_its_two_parts():
    assert (read_task("toy", "train"), read_task("toy", "held_out")) == make_toy()
    assert TASKS["toy"].decoding["num_beams"] == 1
    with pytest.raises(ConfigError, match="did you mean 'held_out'"):
        read_task("toy", "heldout")
    with pytest.raises(ConfigError, match="takes no target template"):
        read_task("toy", "train", target="x")
