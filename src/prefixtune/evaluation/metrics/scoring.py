"""Metrics of texts by name, measured on outputs against references.

A new metric of texts is one line here and a function in its module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from prefixtune.evaluation.metrics import ngrams
from prefixtune.evaluation.metrics.alignment import meteor, ter
from prefixtune.evaluation.metrics.java import Unavailable
from prefixtune.evaluation.metrics.measurement import Measurement
from prefixtune.evaluation.metrics.protocols import PROTOCOLS, Texts, prepare_texts


class Metric(NamedTuple):
    """One way to score texts: its usual name, what measures it, and whether more is better (not of error rates)."""

    title: str
    measure: Callable[[Texts], Measurement]
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "bleu": Metric("BLEU", ngrams.bleu),
    "bleu_sound": Metric("BLEU (absent references ignored)", partial(ngrams.bleu, padded=False)),
    "nist": Metric("NIST", ngrams.nist),
    "meteor": Metric("METEOR", meteor),
    "rouge_1": Metric("ROUGE-1", partial(ngrams.rouge, "1")),
    "rouge_2": Metric("ROUGE-2", partial(ngrams.rouge, "2")),
    "rouge_l": Metric("ROUGE-L", partial(ngrams.rouge, "L")),
    "cider": Metric("CIDEr", ngrams.cider),
    "ter": Metric("TER", ter, higher_is_better=False),
    "chrf": Metric("chrF++", ngrams.chrf),
    "exact_match": Metric("exact match", ngrams.exact_match),
}


def measure(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "plain",
    metrics: str | Iterable[str] | None = None,
    left_out: dict[str, str] | None = None,
) -> dict[str, Measurement]:
    """Compute metrics once, so that scores of parts, intervals and comparisons need no text again.

    >>> found = measure(["a b c d e"], [["a b c d e", "f"]], metrics=["bleu", "ter"])
    >>> round(found["bleu"].score, 6), found["ter"].score
    (100.0, 0.0)

    Args:
        hypotheses: One text per item; an empty one is allowed.
        references: The references of each item, at least one that is not blank; blank ones are ignored.
        protocol: A name of `PROTOCOLS`: how the texts are prepared.
        metrics: A name of `METRICS`, or several; None: the protocol's own.
        left_out: If given, a metric that cannot be computed on this machine or of these references is left out, and
            this dict gets the reason; otherwise that is an error.

    Raises:
        ValueError: Texts are no strings, the counts differ, there is no item, an item has no reference, or a name is
            unknown.
        Unavailable: (a ValueError) Something that a metric needs is missing on this machine, or it cannot read the
            references.
    """
    names = metric_names(protocol, metrics)
    texts = prepare_texts(PROTOCOLS[protocol], hypotheses, references)
    measured = {}
    for name in names:
        try:
            measured[name] = _measure(METRICS[name], texts)
        except Unavailable as error:
            if left_out is None:
                raise
            left_out[name] = str(error)
    return measured


def _measure(metric: Metric, texts: Texts) -> Measurement:
    found = replace(metric.measure(texts), name=metric.title, higher_is_better=metric.higher_is_better)
    return found if found.independent else replace(found, remeasure=lambda items: _measure(metric, texts.part(items)))


def metric_names(protocol: str, metrics: str | Iterable[str] | None) -> list[str]:
    """The names of the wanted metrics, each once; None: the protocol's.

    Raises:
        ValueError: There is no such protocol or metric.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"there is no protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    wanted = PROTOCOLS[protocol].metrics if metrics is None else (metrics,) if isinstance(metrics, str) else metrics
    names = list(dict.fromkeys(wanted))
    if unknown := [name for name in names if name not in METRICS]:
        raise ValueError(f"there is no metric {unknown[0]!r}; known: {', '.join(METRICS)}")
    return names
