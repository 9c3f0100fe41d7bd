"""What runs, evaluations and studies came to, as values: fields as in their files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

__all__ = ["Cell", "CellStatus", "Difference", "Evaluation", "GroupScores", "Output", "Run", "Score", "Study"]


CellStatus = Literal["done", "failed", "waiting"]


@dataclass(frozen=True)
class Score:
    """A score; None where it is missing or not finite."""

    score: float | None
    implementation: str = ""
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class GroupScores:
    """The scores of a part of the examples."""

    num_examples: int
    scores: Mapping[str, Score]


@dataclass(frozen=True)
class Output:
    """The output for one example."""

    index: int
    source: str
    references: tuple[str, ...]
    output: str
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """An `evaluation.json` and the outputs beside it."""

    title: str
    task: str
    data: str
    split: str
    num_examples: int
    method: str
    backbone: str
    prefix: str
    left_out: Mapping[str, str]
    scores: Mapping[str, Score]
    groups: Mapping[str, Mapping[str, GroupScores]]
    seconds: float | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    outputs: tuple[Output, ...] = field(repr=False)
    overlap: str = ""


@dataclass(frozen=True)
class Run:
    """A training run, an evaluation, or both.

    Attributes:
        path: Its folder.
        config: The configuration of the training; empty where nothing was trained.
        events: The log, without a last line that was cut off.
        file_bytes: Size of what was trained: the prefix, or the weights.
    """

    path: Path
    config: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...] = field(repr=False)
    evaluation: Evaluation | None
    file_bytes: int | None


@dataclass(frozen=True)
class Cell:
    """One run of a study: what distinguishes it from the others, and its result."""

    id: str
    factors: Mapping[str, Any]
    status: CellStatus
    error: str
    figures: Mapping[str, float]
    run: Run | None

    @property
    def point(self) -> str:
        """The point of the grid that it is a repetition of.

        >>> Cell("full-n50-subset1-seed0", {}, "done", "", {}, None).point
        'full-n50'
        """
        return self.id.rpartition("-subset")[0]


@dataclass(frozen=True)
class Difference:
    """A point of a study against its counterpart: for each repetition, and over all of them.

    Attributes:
        point: What the ids of its runs begin with.
        reference: Likewise, of its counterpart.
        part: Of the test set; empty: all of it.
        differences: For each repetition, its score less the counterpart's.
        p_values: For each repetition; None where it was not tested.
    """

    point: str
    reference: str
    part: str
    differences: tuple[float, ...]
    p_values: tuple[float | None, ...]
    mean: float
    standard_error: float | None


@dataclass(frozen=True)
class Study:
    """A `study.json` with its cells and their differences."""

    path: Path
    name: str
    title: str
    task: str
    backbone: str
    factors: tuple[str, ...]
    axis: str
    metric: str
    budget_minutes: float | None
    cut: tuple[str, ...]
    tuning: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    command: str
    date: str
    config: Mapping[str, Any]
    cells: tuple[Cell, ...]
    differences: tuple[Difference, ...] = ()
    difference_test: str = ""
    overlap: str = ""
