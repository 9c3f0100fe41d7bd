"""An example: a source with all its targets, as every task produces it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from prefixtune.errors import DataError, describe_value

__all__ = ["Example", "ExampleLike", "SplitName", "TaskKind", "limit_targets", "references_of"]

TaskKind = Literal["generation", "classification", "tagging"]
"""What a target is: a text, one label, or one tag per token with a space between. It decides how outputs are scored."""
SplitName = Literal["train", "dev", "test"]
"""A part of a data set."""


@dataclass(frozen=True)
class Example:
    """One source and all its targets (references).

    Attributes:
        source: The linearized input, as the model reads it, without separators.
        targets: The wanted outputs, or the only one; empty if the example is only for generation.
        fields: The record that the source was made from, for reports and templates.
        groups: How scores are grouped: the name of a grouping -> this example's group, as in `{"category": "Food"}`.

    Raises:
        DataError: Source or targets are not texts.
    """

    source: str
    targets: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    groups: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.source, str):
            raise DataError(
                f"the source of an example is {describe_value(self.source)}, not a text.",
                hint='write Example("source", ("target",)).',
            )
        if not isinstance(self.targets, tuple):
            # As a sequence, a single text would be one target per character.
            targets = (self.targets,) if isinstance(self.targets, str) else self.targets
            object.__setattr__(self, "targets", tuple(targets) if isinstance(targets, Sequence) else targets)
        if not isinstance(self.targets, tuple) or not all(isinstance(target, str) for target in self.targets):
            raise DataError(
                f"the targets of the example {self.source[:60]!r} are {describe_value(self.targets)}, not texts.",
                hint='write Example("source", ("target",)).',
            )


ExampleLike = Example | Mapping[str, Any]
"""An example, or a dict of its fields."""


def references_of(example: Example, protocol: str) -> list[str]:
    """The texts that an output is scored against: the targets; for DART the official scorer's, if the file has them."""
    official = example.fields.get("official_references") if protocol == "dart" else None
    return list(official or example.targets)


def limit_targets(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first `limit` targets, with their sources; 0: all of them.

    >>> [e.targets for e in limit_targets([Example("a", ("1", "2")), Example("b", ("3",))], 1)]
    [('1',)]
    """
    if not limit:
        return list(examples)
    kept: list[Example] = []
    room = limit
    for example in examples:
        if room <= 0:
            break
        kept.append(replace(example, targets=example.targets[:room]))
        room -= len(example.targets)
    return kept
