"""Exact match: the share of outputs that are one of their references."""

from __future__ import annotations

from prefixtune.evaluation.metrics.base import ItemStatistics, average
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["exact_match"]


def exact_match(texts: Texts) -> ItemStatistics:
    """The share of outputs that equal a reference as the protocol prepares them, in percent."""
    hits = [
        100.0 * (output in references) for output, references in zip(texts.hypotheses, texts.references, strict=True)
    ]
    return average(hits, "prefixtune (share of outputs equal to a reference)")
