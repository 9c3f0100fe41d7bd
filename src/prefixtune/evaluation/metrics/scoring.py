"""All metrics by name, and scoring texts against references.

A new metric of texts is one line here and a function in its module.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from prefixtune.evaluation.metrics import ngrams
from prefixtune.evaluation.metrics.base import ItemStatistics, Unavailable
from prefixtune.evaluation.metrics.meteor import meteor
from prefixtune.evaluation.metrics.protocols import PROTOCOLS, Texts
from prefixtune.evaluation.metrics.significance import Measurement
from prefixtune.evaluation.metrics.ter import ter
from prefixtune.results import Score


@dataclass(frozen=True)
class Metric:
    """One way to score texts.

    Attributes:
        title: Its usual name.
        measure: Texts -> each item's statistics.
        higher_is_better: False for error rates.
    """

    title: str
    measure: Callable[[Texts], ItemStatistics]
    higher_is_better: bool = True


METRICS: dict[str, Metric] = {
    "bleu": Metric("BLEU", ngrams.bleu),
    "bleu_sound": Metric("BLEU (absent references ignored)", ngrams.bleu_without_padding),
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
    texts = Texts(PROTOCOLS[protocol], hypotheses, references)
    measured = {}
    for name in names:
        metric = METRICS[name]
        try:
            statistics = metric.measure(texts)
        except Unavailable as error:
            if left_out is None:
                raise
            left_out[name] = str(error)
            continue
        measured[name] = Measurement(metric.title, metric.higher_is_better, statistics, _remeasure(metric, texts))
    return measured


def compute(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "plain",
    metrics: str | Iterable[str] | None = None,
    left_out: dict[str, str] | None = None,
) -> dict[str, Score]:
    """Score texts against their references: `measure`, of which only the scores are kept.

    >>> scores = compute(["a b c d e"], [["a b c d e", "f"]], metrics=["bleu", "ter"])
    >>> round(scores["bleu"].score, 6), scores["ter"].score
    (100.0, 0.0)
    """
    measured = measure(hypotheses, references, protocol=protocol, metrics=metrics, left_out=left_out)
    return {name: measurement.to_score() for name, measurement in measured.items()}


def metric_names(protocol: str, metrics: str | Iterable[str] | None) -> list[str]:
    """The names of the wanted metrics, each once; None: the protocol's.

    Raises:
        ValueError: There is no such protocol or metric.
    """
    _check_known("protocol", protocol, PROTOCOLS)
    wanted = PROTOCOLS[protocol].metrics if metrics is None else (metrics,) if isinstance(metrics, str) else metrics
    names = list(dict.fromkeys(wanted))
    for name in names:
        _check_known("metric", name, METRICS)
    return names


def _remeasure(metric: Metric, texts: Texts) -> Callable[[Sequence[int]], ItemStatistics]:
    return lambda items: metric.measure(texts.part(items))


def _check_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, list(known), n=1)
        more = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        raise ValueError(f"there is no {what} {name!r}; {more}")
