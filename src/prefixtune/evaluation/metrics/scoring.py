"""Score texts against references: scores, intervals, comparisons."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Sequence

from prefixtune.evaluation.metrics.base import ItemStatistics, Score, Unavailable
from prefixtune.evaluation.metrics.protocols import PROTOCOLS
from prefixtune.evaluation.metrics.registry import METRICS, Metric
from prefixtune.evaluation.metrics.significance import Comparison, Measurement, randomize
from prefixtune.evaluation.metrics.texts import Texts

__all__ = ["compare", "compute", "measure", "metric_names"]


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


def metric_names(protocol: str, metrics: str | Iterable[str] | None) -> list[str]:
    """The names of the wanted metrics, each once; None: the protocol's.

    Raises:
        ValueError: There is no such protocol or metric.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(_unknown("protocol", protocol, PROTOCOLS))
    wanted = PROTOCOLS[protocol].metrics if metrics is None else (metrics,) if isinstance(metrics, str) else metrics
    for name in wanted:
        if name not in METRICS:
            raise ValueError(_unknown("metric", name, METRICS))
    return list(dict.fromkeys(wanted))


def compute(
    hypotheses: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    protocol: str = "plain",
    metrics: str | Iterable[str] | None = None,
    left_out: dict[str, str] | None = None,
) -> dict[str, Score]:
    """Score texts against their references.

    >>> scores = compute(["a b c d e"], [["a b c d e", "f"]], metrics=["bleu", "ter"])
    >>> round(scores["bleu"].score, 6), scores["ter"].score
    (100.0, 0.0)

    Args:
        hypotheses: As in `measure`, like the other arguments.
        references: Likewise.
        protocol: Likewise.
        metrics: Likewise.
        left_out: Likewise.

    Returns:
        By metric, in the order of `metrics` or the protocol's.

    Raises:
        ValueError: As `measure`.
    """
    measured = measure(hypotheses, references, protocol=protocol, metrics=metrics, left_out=left_out)
    return {name: measurement.to_score() for name, measurement in measured.items()}


def compare(
    first: Sequence[str],
    second: Sequence[str],
    references: Sequence[Sequence[str]],
    metric: str,
    protocol: str = "plain",
    *,
    samples: int = 1000,
    seed: int = 0,
) -> Comparison:
    """Test whether two systems' scores differ by more than chance (see `randomize`).

    >>> compare(["a b c d e"] * 2, ["a b c d e"] * 2, [["a b c d e"]] * 2, "bleu").p_value
    1.0

    Args:
        first: One system's outputs, one per item.
        second: The other system's outputs for the same items.
        references: As in `measure`.
        metric: A name of `METRICS`.
        protocol: A name of `PROTOCOLS`.
        samples: How many random exchanges.
        seed: Seed of the exchanges.

    Raises:
        ValueError: As `measure`, or `samples` is out of range.
    """
    one, other = (measure(texts, references, protocol=protocol, metrics=[metric])[metric] for texts in (first, second))
    return randomize(one, other, samples=samples, seed=seed)


def _remeasure(metric: Metric, texts: Texts) -> Callable[[Sequence[int]], ItemStatistics]:
    return lambda items: metric.measure(texts.part(items))


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    more = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    return f"there is no {what} {name!r}; {more}"
