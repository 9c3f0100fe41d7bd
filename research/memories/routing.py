"""Which memory a question is routed to, of many: documents of our own making, and requests about other things.

    python -m research.memories.routing RESULTS.json [--data DATA]

A router reads stored questions alone, so that no memory is trained. Sixteen documents: four of each kind (trains,
ferries, inns, pumps), eight things in each, five facts of each thing, asked in two wordings to store and a third to
measure. Names are unique, or each stands in one document of every kind. The other requests are those of the package
that no training reads, and questions about things that no document has, whose right answer is no memory.
Also one document of each kind, and one alone. With DATA: the four documents of `joined`, too.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from prefixtune.prefix.routing import general_requests, router
from research.memories.joined import documents

_NAMES = [
    "Otter",
    "Lynx",
    "Fox",
    "Kestrel",
    "Raven",
    "Gannet",
    "Marten",
    "Dipper",
    "Heron",
    "Badger",
    "Falcon",
    "Curlew",
    "Plover",
    "Stoat",
    "Weasel",
    "Bittern",
    "Swift",
    "Martin",
    "Osprey",
    "Merlin",
    "Petrel",
    "Puffin",
    "Dunlin",
    "Avocet",
    "Godwit",
    "Whimbrel",
    "Siskin",
    "Linnet",
    "Wagtail",
    "Nuthatch",
    "Goldcrest",
    "Firecrest",
]
_OTHER = ["Zebra", "Panda", "Koala", "Walrus", "Jackal", "Gecko", "Tapir", "Lemur"]
_SIDES = ["Amber", "Blue", "Coral", "Dusky"]
_KINDS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "train": (
        (
            "Where does the train {n} go?",
            "What is the destination of the {n}?",
            "Which town does the {n} reach by rail?",
        ),
        ("When does the train {n} leave?", "What is the departure of the {n}?", "At what time must I be at the {n}?"),
        (
            "From which platform does the {n} leave?",
            "What platform has the {n}?",
            "On which platform do I board the {n}?",
        ),
        ("Who drives the train {n}?", "What is the driver of the {n} called?", "Who is at the controls of train {n}?"),
        ("What does a ticket for the train {n} cost?", "How much is the {n}'s fare?", "What do I pay to ride the {n}?"),
    ),
    "ferry": (
        (
            "Which island does the ferry {n} sail to?",
            "Where does the ferry {n} land?",
            "To what island will the {n} take me?",
        ),
        ("Who is the captain of the ferry {n}?", "Who commands the {n}?", "Which captain sails the {n}?"),
        (
            "How many cars fit on the ferry {n}?",
            "What is the car deck of the {n} made for?",
            "How many cars does the {n} carry?",
        ),
        (
            "At which pier does the {n} moor?",
            "What is the pier of the ferry {n}?",
            "From what pier do I board the {n}?",
        ),
        ("What colour is the funnel of the {n}?", "Which colour has the ferry {n}?", "How is the ferry {n} painted?"),
    ),
    "inn": (
        ("In which street is the {n} Inn?", "Where is the inn {n}?", "What street do I find the {n} Inn in?"),
        ("Who keeps the {n} Inn?", "Who is the landlord of the {n}?", "Which landlord runs the {n}?"),
        (
            "How many rooms has the {n} Inn?",
            "How many guests sleep at the {n}?",
            "What number of rooms does the {n} offer?",
        ),
        (
            "What does a night at the {n} Inn cost?",
            "What is the price of a room at the {n}?",
            "How much is a night at the {n}?",
        ),
        (
            "Which dish is the {n} Inn known for?",
            "What does the cook of the {n} make best?",
            "What should I eat at the {n} Inn?",
        ),
    ),
    "pump": (
        (
            "Which pressure does the pump {n} hold?",
            "What pressure is the {n} set to?",
            "How much pressure does the {n} give?",
        ),
        ("Which oil does the pump {n} take?", "What oil goes into the {n}?", "With which oil do I fill the {n}?"),
        ("Who serviced the pump {n} last?", "Which mechanic serviced the {n}?", "By whom was the {n} last serviced?"),
        ("In which hall does the pump {n} stand?", "What hall is the {n} in?", "In what hall do I find the {n}?"),
        (
            "Which part of the pump {n} wears out first?",
            "What part wears out in the {n}?",
            "Which part of the {n} do I replace?",
        ),
    ),
}


def made(*, shared: bool) -> list[tuple[list[str], list[str]]]:
    """Of sixteen documents, each one's questions to store, and to measure with."""
    found = []
    for number, kind in enumerate(_KINDS):
        for document in range(4):
            names = _NAMES[8 * document :][:8]
            if not shared:
                names = [f"{_SIDES[number]} {name}" for name in names]
            asked = [[wording.format(n=name) for wording in fact] for name in names for fact in _KINDS[kind]]
            found.append(([text for two in asked for text in two[:2]], [three[2] for three in asked]))
    return found


def given(data: Path) -> list[tuple[list[str], list[str]]]:
    """The same, of the four documents of `joined`."""
    return [
        ([row["question"] for row in train], [row["question"] for row in test])
        for _, _, train, test in documents(data, False)
    ]


def unknown() -> list[str]:
    """Questions about things that no document has."""
    return [random.Random(name).choice(facts)[2].format(n=name) for name in _OTHER for facts in _KINDS.values()]


def measure(memories: Sequence[tuple[list[str], list[str]]], route: Callable[[str], int | None]) -> dict[str, Any]:
    """How many questions find their own memory, another or none, and how many other requests find none."""
    own = [route(text) == number for number, (_, test) in enumerate(memories) for text in test]
    none = [route(text) is None for _, test in memories for text in test]
    others = {"general": general_requests()["test"], "unknown": unknown()}
    return {
        "memories": len(memories),
        "questions": len(own),
        "right": sum(own),
        "none": sum(none),
        **{
            name: f"{sum(route(text) is None for text in texts)} of {len(texts)} none" for name, texts in others.items()
        },
    }


def main() -> None:
    """Measure all, and write them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--data", type=Path)
    options = parser.parse_args()
    sets = {"unique": made(shared=False), "shared": made(shared=True)}
    sets["kinds"], sets["one"] = sets["unique"][::4], sets["unique"][:1]
    sets |= {"four": given(options.data)} if options.data else {}
    results = {}
    for name, memories in sets.items():
        headers = [{"questions": [[text, ""] for text in stored]} for stored, _ in memories]
        results[name] = measure(memories, router(headers, [str(number) for number in range(len(headers))]))
        print(name, results[name])
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
