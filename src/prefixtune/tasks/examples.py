"""What every task produces: a source with all of its targets; and the text format around them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from prefixtune.errors import DataError, did_you_mean

__all__ = ["Example", "ExampleLike", "TextFormat", "limit_targets", "references_of"]


@dataclass(frozen=True)
class Example:
    """One source and every target (reference) that it has.

    Attributes:
        source: The linearized input, as the model reads it, without separators.
        targets: The wanted outputs; empty where only generation is meant.
        fields: The record that the source was made from, for reports and templates.
        groups: What scores are split by: the name of a grouping -> this example's group, as in `{"category": "Food"}`.
    """

    source: str
    targets: tuple[str, ...] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    groups: Mapping[str, str] = field(default_factory=dict, compare=False)


ExampleLike = Example | Mapping[str, Any]
"""What stands for an example: itself, or a dict of its fields."""


@dataclass(frozen=True)
class TextFormat:
    """How a source and a target become one sequence (the authors' format: ` {source} <sep> {target} <end>`).

    `{separator}` and `{end}` stand for special tokens: the tokenizer's beginning-of-sequence token (its
    end-of-sequence token where it has none) and its end-of-sequence token. Both are stored in an artifact, so that
    whoever serves it formats a request as the training did.

    Attributes:
        prompt: Template of the part that is given; has `{source}` and may have `{separator}`.
        target: Template of the part that is learned; has `{target}`; the end token follows it.
    """

    prompt: str = " {source} {separator}"
    target: str = " {target} "

    def __post_init__(self) -> None:
        for name, needed in (("prompt", "{source}"), ("target", "{target}")):
            template = getattr(self, name)
            if needed not in template:
                raise DataError(
                    f"text format: {name} template {template!r} does not contain {needed}.",
                    hint=f"write {needed} where the text belongs.",
                )

    def format_prompt(self, source: str, separator: str) -> str:
        """The text before the target.

        >>> TextFormat().format_prompt("name : Aromi", "<sep>")
        ' name : Aromi <sep>'
        """
        return self.prompt.replace("{separator}", separator).replace("{source}", source)

    def format_target(self, target: str) -> str:
        """The text that is learned, without its end token.

        >>> TextFormat().format_target("Aromi is a pub.")
        ' Aromi is a pub. '
        """
        return self.target.replace("{target}", target)

    def extract_target(self, output: str) -> str:
        """The target within an output: what `format_target` put around it, and outer space, taken off.

        >>> TextFormat(target="Answer: {target} !").extract_target(" Answer: Aromi. ! ")
        'Aromi.'
        """
        head, tail = (part.strip() for part in self.target.split("{target}", 1))
        return output.strip().removeprefix(head).removesuffix(tail).strip()

    def to_dict(self) -> dict[str, str]:
        """As stored in an artifact's header."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TextFormat:
        """The reverse of `to_dict`.

        Raises:
            DataError: A key is unknown.
        """
        known = {"prompt", "target"}
        for key in values:
            if key not in known:
                raise DataError(f"text format has the unknown key {key!r}.", hint=did_you_mean(key, known))
        return cls(**{key: str(value) for key, value in values.items()})


def references_of(example: Example, protocol: str) -> list[str]:
    """What an output is scored against: the targets; for DART the official scorer's texts, where the file has them."""
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
