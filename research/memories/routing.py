"""Which memory a question is routed to, of many: documents of our own making, and requests about other things.

    python -m research.memories.routing RESULTS.json [--data DATA]

A router reads stored questions alone, so that no memory is trained. Sixteen documents: four of each kind (trains,
ferries, inns, pumps), eight things in each, five facts of each thing, asked in two wordings to store and a third to
measure. Names are unique, or each stands in one document of every kind. The other requests are those of the package
that no training reads, and questions about things that no document has, whose right answer is no memory.
Also one document of each kind, and one alone. With DATA: the four documents of `joined`, too, and their quarters.
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

_MADE: dict[str, Any] = json.loads(Path(__file__).with_name("kinds.json").read_text(encoding="utf-8"))
"""Names, and of each kind of document the three wordings of each question."""


def made(*, shared: bool) -> list[tuple[list[str], list[str]]]:
    """Of sixteen documents, each one's questions to store, and to measure with."""
    found = []
    for number, kind in enumerate(_MADE["kinds"]):
        for document in range(4):
            names = _MADE["names"][8 * document :][:8]
            if not shared:
                names = [f"{_MADE['sides'][number]} {name}" for name in names]
            asked = [[wording.format(n=name) for wording in fact] for name in names for fact in _MADE["kinds"][kind]]
            found.append(([text for two in asked for text in two[:2]], [three[2] for three in asked]))
    return found


def given(data: Path, parts: int) -> list[tuple[list[str], list[str]]]:
    """The same, of the four documents of `joined`, each in some parts."""
    found = documents(data, parts)
    return [([row["question"] for row in train], [row["question"] for row in test]) for _, _, train, test in found]


def unknown() -> list[str]:
    """Questions about things that no document has."""
    return [
        random.Random(name).choice(facts)[2].format(n=name)
        for name in _MADE["unknown"]
        for facts in _MADE["kinds"].values()
    ]


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
    sets |= {"four": given(options.data, 1), "quarters": given(options.data, 4)} if options.data else {}
    results = {}
    for name, memories in sets.items():
        headers = [{"questions": [[text, ""] for text in stored]} for stored, _ in memories]
        results[name] = measure(memories, router(headers, [str(number) for number in range(len(headers))]))
        print(name, results[name])
    options.results.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
