"""Hypotheses and references, prepared by a protocol once for all metrics."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

from prefixtune.evaluation.metrics.base import check_references
from prefixtune.evaluation.metrics.java import treebank_words
from prefixtune.evaluation.metrics.protocols import Protocol

__all__ = ["Texts"]


class Texts:
    """A set of items.

    Args:
        protocol: How texts are prepared.
        hypotheses: One text per item; may be empty.
        references: The references of each item, at least one that is not blank; blank ones are left out.

    Raises:
        ValueError: The counts differ, there is no item, or an item has no reference.
    """

    def __init__(
        self,
        protocol: Protocol,
        hypotheses: Sequence[str],
        references: Sequence[Sequence[str]],
    ) -> None:
        self.protocol = protocol
        self.raw_hypotheses = list(hypotheses)
        self.raw_references = [item[: protocol.max_references] for item in check_references(hypotheses, references)]

    @cached_property
    def hypotheses(self) -> list[str]:
        """The prepared hypotheses."""
        return [self.protocol.prepare(text) for text in self.raw_hypotheses]

    @cached_property
    def references(self) -> list[list[str]]:
        """The prepared references."""
        return [[self.protocol.prepare_reference(text) for text in item] for item in self.raw_references]

    @cached_property
    def treebank(self) -> tuple[list[str], list[list[str]]]:
        """Hypotheses and references as Penn Treebank words without punctuation; a text may have none.

        Raises:
            Unavailable: Java or pycocoevalcap is missing.
        """
        flat = [*self.hypotheses, *(text for item in self.references for text in item)]
        words = iter(treebank_words(flat))
        hypotheses = [next(words) for _ in self.hypotheses]
        return hypotheses, [[next(words) for _ in item] for item in self.references]

    def part(self, items: Sequence[int]) -> Texts:
        """Some of the items, as a set of their own; texts that are already tokenized are not tokenized again."""
        chosen = Texts(
            self.protocol,
            [self.raw_hypotheses[index] for index in items],
            [self.raw_references[index] for index in items],
        )
        if "treebank" in self.__dict__:
            hypotheses, references = self.treebank
            chosen.treebank = [hypotheses[index] for index in items], [references[index] for index in items]
        return chosen
