"""The two sets made here for labels and for tags: reproducible, disjoint, and as their rules say."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable

import pytest

from prefixtune.data import TASKS, Example, check_labels, check_tags, label_names, read_task, tag_names
from prefixtune.data.toy.classification import DEPARTMENTS, MENTIONS, REQUESTS, make_toy_labels
from prefixtune.data.toy.tagging import SPANS, make_toy_tags
from prefixtune.errors import ConfigError

Make = Callable[..., tuple[list[Example], list[Example]]]
BOTH = pytest.mark.parametrize("make", [make_toy_labels, make_toy_tags])


@pytest.mark.parametrize(
    ("make", "sizes", "digest"),
    [
        (make_toy_labels, (400, 100), "7b01cc3bc0c33846af779be2b0b21b73f3bad0ee3262a16520579e48c2d91a3a"),
        (make_toy_tags, (300, 60), "601e667cd232408c362e3062d631a765b0b62821fe10cc8374653bf651998ea4"),
    ],
)
def test_the_default_sets_never_change(make: Make, sizes: tuple[int, int], digest: str):
    train, held_out = make()
    assert (len(train), len(held_out)) == sizes
    text = "\n".join("\t".join((example.source, *example.targets)) for example in train + held_out)
    assert hashlib.sha256(text.encode()).hexdigest() == digest
    assert make() == (train, held_out)
    assert make(seed=8)[0] != train


def words(examples: list[Example]) -> set[str]:
    return {word for example in examples for word in re.findall(r"[\w:']+", example.source.lower())}


@BOTH
@pytest.mark.parametrize(("seed", "train", "held_out"), [(7, 400, 100), (0, 100, 300), (3, 100, 0), (11, 150, 50)])
def test_held_out_messages_are_new_combinations_of_known_words(make: Make, seed: int, train: int, held_out: int):
    training, holding = make(seed, train, held_out)
    assert (len(training), len(holding)) == (train, held_out)
    assert len({example.source for example in training + holding}) == train + held_out
    assert words(holding) <= words(training)
    for example in training + holding:
        assert len(example.targets) == 1
        assert "\n" not in example.source


@BOTH
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"train": 99, "held_out": -1}, "train is 99; allowed: 100 to 10,000.*held_out is -1"),
        ({"seed": -7}, "seed is -7"),
        ({"held_out": 10_001}, "allowed: 0 to 10,000"),
    ],
)
def test_impossible_sizes_are_refused(make: Make, arguments: dict[str, int], says: str):
    with pytest.raises(ConfigError, match=says):
        make(**arguments)


@pytest.mark.parametrize(("name", "make"), [("toy_labels", make_toy_labels), ("toy_tags", make_toy_tags)])
def test_a_task_reads_its_two_parts(name: str, make: Make):
    assert (read_task(name, "train"), read_task(name, "held_out")) == make()
    assert TASKS[name].parts == ("train", "held_out")
    with pytest.raises(ConfigError, match=f"task '{name}' is made.*did you mean 'held_out'"):
        read_task(name, "heldout")
    with pytest.raises(ConfigError, match="takes no source template"):
        read_task(name, "train", source="x")


def subjects(text: str, phrases: tuple[str, ...]) -> list[str]:
    """The departments of the subjects that follow one of the phrases."""
    return [
        department
        for department, names in DEPARTMENTS.items()
        for name in names
        for phrase in phrases
        if f"{phrase} {name}".lower() in text.lower()
    ]


def test_what_is_asked_for_decides_and_else_the_only_subject():
    train, held_out = make_toy_labels(train=1000)
    for example in train + held_out:
        asked, mentioned = subjects(example.source, REQUESTS), subjects(example.source, MENTIONS)
        assert example.targets == tuple(asked or mentioned)
        assert example.fields["mentioned"] == ((mentioned or [""])[0] if asked else "")
        assert len(asked) + len(mentioned) == (2 if example.fields["mentioned"] else 1)


def test_keywords_alone_do_not_sort_the_messages():
    train, held_out = make_toy_labels(train=1000)
    first = last = 0
    for example in train + held_out:
        text = example.source.lower()
        named = {name: text.find(name.lower()) for names in DEPARTMENTS.values() for name in names}
        order = sorted((place, name) for name, place in named.items() if place >= 0)
        assert 1 <= len(order) <= 2
        department = {name: part for part, names in DEPARTMENTS.items() for name in names}
        first += department[order[0][1]] == example.targets[0]
        last += department[order[-1][1]] == example.targets[0]
    # Half of the messages name two subjects, and the one asked for comes first in half of those.
    assert 0.7 < first / 1100 < 0.8
    assert 0.7 < last / 1100 < 0.8
    two = [example for example in train if example.fields["mentioned"]]
    pairs = Counter((example.targets[0], example.fields["mentioned"]) for example in two)
    assert len(pairs) == 20
    assert max(pairs.values()) - min(pairs.values()) <= 3


def test_labels_are_balanced_and_known():
    train, held_out = make_toy_labels()
    names = label_names(train)
    assert names == tuple(DEPARTMENTS) == ("bedding", "kitchen", "luggage", "tickets", "timetable")
    check_labels(held_out, names)
    for part in (train, held_out):
        counts = Counter(example.targets[0] for example in part).values()
        assert max(counts) <= 1.2 * min(counts)


def test_spans_are_those_of_their_type_and_all_else_is_outside():
    train, held_out = make_toy_tags()
    names = tag_names(train)
    assert names == ("O", *(f"{place}-{kind}" for kind in sorted(SPANS) for place in "BI"))
    check_tags(held_out, names)
    seen = set()
    for example in train:
        tokens, tags = example.fields["tokens"], example.fields["tags"]
        assert example.source.split() == list(tokens)
        assert example.targets[0].split() == list(tags)
        starts = [number for number, tag in enumerate(tags) if tag.startswith("B-")]
        for start in starts:
            end = start + 1
            while end < len(tags) and tags[end] == f"I-{tags[start][2:]}":
                end += 1
            assert " ".join(tokens[start:end]) in SPANS[tags[start][2:]]
            seen.add((tags[start], " ".join(tokens[start:end])))
    assert len(seen) == sum(map(len, SPANS.values()))


def test_a_list_of_words_does_not_tag_them():
    train, _ = make_toy_tags()
    tags: dict[str, set[str]] = {}
    for example in train:
        for token, tag in zip(example.fields["tokens"], example.fields["tags"], strict=True):
            tags.setdefault(token, set()).add(tag)
    assert {"B-TRAIN", "B-STATION"} <= tags["Heron"] & tags["Fox"]
    assert tags["coach"] == {"B-COACH", "O"}
    assert {"O", "I-TIME"} <= tags["past"] | tags["seven"]
    joined = [example.targets[0] for example in train]
    assert any("B-STATION B-STATION" in line for line in joined)
    assert any("B-TIME B-TRAIN" in line for line in joined)
    assert any(set(line.split()) == {"O"} for line in joined)
