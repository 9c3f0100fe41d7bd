"""Scores of strings: texts, labels and tags against their references.

`measure` scores outputs as a task's official script does (its protocol), and keeps each item's statistics, so that
parts, intervals and comparisons cost little more. Every score names its implementation.

Of this project, this package imports the model of a score alone: no example, no task, no model, no exception. Misuse
raises `ValueError`.
"""

from __future__ import annotations

from prefixtune.evaluation.metrics.java import Unavailable
from prefixtune.evaluation.metrics.labels import accuracy, macro_f1, span_f1
from prefixtune.evaluation.metrics.measurement import Measurement, bootstrap, randomize
from prefixtune.evaluation.metrics.scoring import measure

__all__ = ["Measurement", "Unavailable", "accuracy", "bootstrap", "macro_f1", "measure", "randomize", "span_f1"]
