"""Scores of strings: texts, labels and tags against their references.

`compute` scores outputs as a task's official script does (its protocol); `measure` keeps each item's statistics, so
that parts, intervals and comparisons cost little more. Every score names its implementation.

This package imports nothing else of this project: no example, no task, no model, no exception. Misuse raises
`ValueError`.
"""

from __future__ import annotations

from prefixtune.evaluation.metrics.base import Score, Unavailable
from prefixtune.evaluation.metrics.classification import accuracy, macro_f1, span_f1
from prefixtune.evaluation.metrics.protocols import PROTOCOLS
from prefixtune.evaluation.metrics.registry import METRICS
from prefixtune.evaluation.metrics.scoring import compare, compute, measure, metric_names
from prefixtune.evaluation.metrics.significance import Comparison, Measurement, bootstrap, randomize

__all__ = [
    "METRICS",
    "PROTOCOLS",
    "Comparison",
    "Measurement",
    "Score",
    "Unavailable",
    "accuracy",
    "bootstrap",
    "compare",
    "compute",
    "macro_f1",
    "measure",
    "metric_names",
    "randomize",
    "span_f1",
]
