"""The pairs that are measured: E2E where its files are found, otherwise the project's own toy set."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example, read_task
from prefixtune.data.encoding import TokenizedExample, default_format, encode_examples
from prefixtune.data.order import epoch_batches

E2E = Path(__file__).resolve().parents[2] / "shared" / "data" / "e2e" / "train.jsonl.gz"
"""Where E2E is looked for: beside the repository."""

Batch = list[TokenizedExample]
"""Sources with one or several targets each."""


@dataclass(frozen=True)
class Data:
    """Examples, and their name in the results."""

    name: str
    examples: list[Example]

    @property
    def num_targets(self) -> int:
        """Pairs of a source and one of its targets."""
        return sum(len(example.targets) for example in self.examples)

    def describe(self) -> dict[str, object]:
        """For the results file."""
        return {
            "name": self.name,
            "sources": len(self.examples),
            "pairs": self.num_targets,
            "targets_per_source": round(self.num_targets / len(self.examples), 2),
        }


def read(path: Path | None) -> Data:
    """Read E2E; without a path, from beside the repository, or the toy set if that is missing.

    Raises:
        DataError: The file is missing or wrong.
    """
    if path is None and not E2E.is_file():
        return Data("toy (made by prefixtune)", read_task("toy", "train"))
    chosen = path or E2E
    return Data(f"E2E ({chosen.parent.name}/{chosen.name})", read_task("e2e", chosen))


def encode(backbone: Backbone, data: Data, prefix_length: int) -> Sequence[TokenizedExample]:
    """All examples as token ids, formatted as in training."""
    return encode_examples(backbone, data.examples, default_format(backbone), prefix_length=prefix_length).examples


def first_batches(
    examples: Sequence[TokenizedExample], *, batch_size: int, targets_per_source: int, num_batches: int, seed: int
) -> list[Batch]:
    """The first full batches of training."""
    batches = (
        batch
        for epoch in count()
        for batch in epoch_batches(
            examples, batch_size=batch_size, targets_per_source=targets_per_source, seed=seed, epoch=epoch
        )
        if sum(len(group.targets) for group in batch) == batch_size
    )
    return list(islice(batches, num_batches))


def to_lists(batches: list[Batch]) -> list[list[list[object]]]:
    """Batches as JSON."""
    return [[[list(group.prompt), [list(target) for target in group.targets]] for group in batch] for batch in batches]


def from_lists(batches: list[list[list[Any]]]) -> list[Batch]:
    """The reverse of `to_lists`."""
    return [
        [TokenizedExample(tuple(prompt), tuple(map(tuple, targets))) for prompt, targets in batch] for batch in batches
    ]
