"""Scores on strings: texts, labels and tags against their references.

`compute` scores outputs as a task's official script does (its protocol); `measure` keeps what each item adds, so that
parts, intervals and comparisons cost nothing more. Every score names what made it.

Knows nothing of this project: no example, no task, no model, no exception of it. Misuse raises `ValueError`.
"""

from prefixtune.metrics.base import Measurement, Score, Unavailable
from prefixtune.metrics.labels import accuracy, macro_f1, span_f1
from prefixtune.metrics.protocols import PROTOCOLS
from prefixtune.metrics.resampling import Comparison, bootstrap, randomize
from prefixtune.metrics.scoring import METRICS, bleu, compare, compute, interval, measure

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Comparison",
    "Measurement",
    "Score",
    "Unavailable",
    "accuracy",
    "bleu",
    "bootstrap",
    "compare",
    "compute",
    "interval",
    "macro_f1",
    "measure",
    "randomize",
    "span_f1",
]
