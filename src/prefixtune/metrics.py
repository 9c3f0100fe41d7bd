"""Scores on strings: what was generated against its references.

Knows nothing of this project: no example, no task, no model, no exception of it. Misuse raises `ValueError`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["Score", "bleu"]


@dataclass(frozen=True)
class Score:
    """One figure, with what made it.

    Attributes:
        name: Of the metric.
        score: The figure, on the metric's usual scale.
        implementation: Library, version and settings: figures of different implementations do not compare.
    """

    name: str
    score: float
    implementation: str


def bleu(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> Score:
    """Corpus BLEU on the scale 0 to 100: lower-cased, 13a tokens, each item against all its own references.

    The settings reproduce the official figures of the E2E challenge. Items may differ in their number of references;
    an absent one counts as absent, not as an empty text. An empty hypothesis is allowed and scores nothing.

    Args:
        hypotheses: One text an item.
        references: For each item its references, at least one that is not blank; blank ones are left out.

    Raises:
        ValueError: The counts differ, there is no item, or an item has no reference.
    """
    _check(hypotheses, references)
    kept = [[text for text in item if text.strip()] for item in references]
    for number, item in enumerate(kept):
        if not item:
            raise ValueError(f"item {number} (from 0) has no reference; at least one text is needed")
    import sacrebleu

    streams = [[item[number] if number < len(item) else None for item in kept] for number in range(max(map(len, kept)))]
    metric = sacrebleu.BLEU(lowercase=True, tokenize="13a")
    result = metric.corpus_score(list(hypotheses), streams)
    return Score(
        name="BLEU",
        score=float(result.score),
        implementation=f"sacrebleu {sacrebleu.__version__} ({metric.get_signature()})",
    )


def _check(hypotheses: Sequence[str], references: Sequence[Sequence[str]]) -> None:
    if isinstance(hypotheses, str) or isinstance(references, str) or any(isinstance(item, str) for item in references):
        raise ValueError("hypotheses must be a list of strings, and references a list of lists of strings")
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses but references for {len(references)} items; counts must agree")
    if not hypotheses:
        raise ValueError("there is no hypothesis; at least one is needed")
