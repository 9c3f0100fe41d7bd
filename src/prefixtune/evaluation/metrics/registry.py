"""All metrics by name; a new metric of texts is one line here and a function in its module."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from prefixtune.evaluation.metrics import ngrams
from prefixtune.evaluation.metrics.base import ItemStatistics
from prefixtune.evaluation.metrics.meteor import meteor
from prefixtune.evaluation.metrics.ter import ter
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["METRICS", "Metric"]


@dataclass(frozen=True)
class Metric:
    """One way to score texts.

    Attributes:
        title: Its usual name.
        scale: Lowest and highest score, in words.
        measure: Texts -> each item's statistics.
        higher_is_better: False for error rates.
    """

    title: str
    scale: str
    measure: Callable[[Texts], ItemStatistics]
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "bleu": Metric("BLEU", "0 to 100", ngrams.bleu),
    "bleu_sound": Metric("BLEU (absent references ignored)", "0 to 100", ngrams.bleu_without_padding),
    "nist": Metric("NIST", "0 upward", ngrams.nist),
    "meteor": Metric("METEOR", "0 to 1", meteor),
    "rouge_1": Metric("ROUGE-1", "0 to 1", ngrams.rouge("1")),
    "rouge_2": Metric("ROUGE-2", "0 to 1", ngrams.rouge("2")),
    "rouge_l": Metric("ROUGE-L", "0 to 1", ngrams.rouge("L")),
    "cider": Metric("CIDEr", "0 to 10", ngrams.cider),
    "ter": Metric("TER", "0 upward, lower is better", ter, higher_is_better=False),
    "chrf": Metric("chrF++", "0 to 100", ngrams.chrf),
    "exact_match": Metric("exact match", "0 to 100", ngrams.exact_match),
}
