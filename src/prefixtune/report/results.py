"""What runs, evaluations and studies came to: fields and their types as in their files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

__all__ = [
    "Cell",
    "CellStatus",
    "Comparisons",
    "Difference",
    "Evaluation",
    "Event",
    "GroupScores",
    "Output",
    "Pair",
    "Run",
    "Score",
    "Stored",
    "Study",
    "losses_of",
]


CellStatus = Literal["done", "failed", "waiting"]
_MOST = 10**15
_HUGE = 1e100
"""Numbers from here on count as not finite: no result is one, and charts cannot show them."""


def _known(values: Any) -> Any:
    """An object without what is missing: null, and numbers that are not finite."""
    return {key: value for key, value in values.items() if _is_known(value)} if isinstance(values, dict) else values


def _is_known(value: Any) -> bool:
    return value is not None and not (isinstance(value, float) and not abs(value) < _HUGE)


def _interval(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    if len(value) not in (0, 2):
        raise ValueError(f"is {str(value)[:60]}, but must be two numbers")
    return tuple(value) if value and all(map(_is_known, value)) else None


def _scalar(value: Any) -> Any:
    too_large = isinstance(value, int) and abs(value) > _MOST
    return json.dumps(value) if too_large or isinstance(value, list | dict) else value


def _whole(value: Any) -> Any:
    """A text in which U+FFFD stands for half a surrogate pair, which pydantic refuses."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_whole)]
Strings = Annotated[tuple[Text, ...], Field(strict=False)]
Count = Annotated[int, Field(ge=-_MOST, le=_MOST)]
Interval = Annotated[tuple[float, float] | None, BeforeValidator(_interval)]
NumberOrNan = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]


class Stored(BaseModel):
    """A JSON object in a file; what is null or not finite counts as missing, and unknown keys are ignored."""

    model_config = ConfigDict(strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _drop_missing(cls, values: Any) -> Any:
        return _known(values)


class Score(Stored):
    """A score; None where it is missing or not finite."""

    score: float | None = None
    implementation: Text = ""
    interval: Interval = None
    higher_is_better: bool = True


class GroupScores(Stored):
    """The scores of a part of the examples."""

    num_examples: Count = 0
    scores: dict[Text, Score] = {}


class Output(Stored):
    """The output for one example."""

    index: Count = Field(0, alias="number")
    source: Text = ""
    references: Strings = ()
    output: Text = ""
    groups: dict[Text, Any] = {}


class Overlap(Stored):
    """How many test or development sources are also in the training set, or test sources in the development set."""

    count: Count = 0
    num_examples: Count = 0
    train: Text = ""

    def __str__(self) -> str:
        """In words, of test sources; empty: none, or it is not known."""
        return self.of("test")

    def of(self, split: str, other: str = "training") -> str:
        """The same, of the sources of any split in any other."""
        count, total = self.count, self.num_examples
        if count < 1 or total < 1:
            return ""
        share = f"{count:,} of {total:,} {split} sources ({count / total:.1%})"
        return f"{share} are also in the {other} set {self.train!r}"


class Evaluation(Stored):
    """An `evaluation.json` and the outputs of its `outputs.jsonl`."""

    title: Text = ""
    task: Text = ""
    data: Text = ""
    split: Text = ""
    num_examples: Count = 0
    method: Text = ""
    backbone: Text = ""
    prefix: Text = ""
    left_out: dict[Text, Any] = {}
    scores: dict[Text, Score]
    groups: dict[Text, dict[Text, GroupScores]] = {}
    seconds: float | None = None
    settings: dict[Text, Any] = {}
    machine: dict[Text, Any] = {}
    versions: dict[Text, Any] = {}
    outputs: tuple[Output, ...] = Field((), repr=False)
    overlap: Overlap = Overlap()


class Event(Stored):
    """A line of a training log: what of it must be a number, and everything else as it is."""

    model_config = ConfigDict(extra="allow")

    step: float | None = None
    loss: float | None = None
    loss_per_token: float | None = None
    seconds: float | None = None
    best_loss: float | None = None
    num_trained: float | None = None
    num_stored: float | None = None


class Run(Stored):
    """A training run, an evaluation, or both.

    Attributes:
        path: Its folder.
        config: The configuration of the training; empty where nothing was trained.
        events: The log, without a last line that was cut off.
        file_bytes: Size of what was trained: the prefix, or the weights.
    """

    path: Path
    config: dict[str, Any]
    events: tuple[dict[str, Any], ...] = Field(repr=False)
    evaluation: Evaluation | None = None
    file_bytes: int | None = None


class Cell(Stored):
    """One run of a study: what distinguishes it from the others, and its result."""

    id: Text
    factors: Annotated[dict[Text, Annotated[Any, BeforeValidator(_scalar)]], BeforeValidator(_known)] = {}
    status: CellStatus = "waiting"
    error: Text = ""
    figures: Annotated[dict[Text, float], BeforeValidator(_known)] = {}
    run: Run | None = None

    @property
    def point(self) -> str:
        """The point of the grid that it is a repetition of.

        >>> Cell(id="full-n50-subset1-seed0").point
        'full-n50'
        """
        return self.id.rpartition("-subset")[0]


class Difference(Stored):
    """A point of a study against its counterpart: for each repetition, and over all of them.

    Attributes:
        point: What the ids of its runs begin with.
        reference: Likewise, of its counterpart.
        part: Of the test set; empty: all of it.
        differences: For each repetition, its score less the counterpart's.
        p_values: For each repetition; None where it was not tested.
        interval: Of the mean, 95 %, over the repetitions; None: there is one, or it was not stored.
        p_value: Of the mean; of a single repetition, its own.
        corrected_p_value: By Holm's correction over the study's comparisons on the same part of the test set.
    """

    point: Text = ""
    reference: Text = ""
    part: Text = ""
    differences: Annotated[tuple[NumberOrNan, ...], Field(strict=False)] = ()
    p_values: Annotated[tuple[float | None, ...], Field(strict=False)] = ()
    mean: float = math.nan
    standard_error: float | None = None
    interval: Interval = None
    p_value: float | None = None
    corrected_p_value: float | None = None

    @property
    def is_complete(self) -> bool:
        """Whether it has everything but, perhaps, p-values and a standard error."""
        finite = all(map(math.isfinite, (self.mean, *self.differences)))
        return finite and len(self.p_values) == len(self.differences)


class Pair(Stored):
    """A run and its counterpart on the same sample and seed.

    Attributes:
        run: Its id.
        reference: Its counterpart's id.
        part: Of the test set; empty: all of it.
        difference: The run's score less its counterpart's.
        p_value: Of the difference, over the test items; None: it was not tested.
    """

    run: Text = ""
    reference: Text = ""
    part: Text = ""
    difference: float = math.nan
    p_value: float | None = None


class Comparisons(Stored):
    """A `comparisons.json`."""

    test: Text = ""
    pairs: Annotated[tuple[Pair, ...], Field(strict=False)] = ()
    points: Annotated[tuple[Difference, ...], Field(strict=False)] = ()


class Study(Stored):
    """A `study.json` with its cells and their differences."""

    path: Path
    name: Text = ""
    title: Text = ""
    task: Text = ""
    backbone: Text = ""
    factors: Strings = ()
    axis: Text = ""
    metric: Text = ""
    budget_minutes: float | None = None
    cut: Strings = ()
    tuning: dict[Text, Any] = {}
    machine: dict[Text, Any] = {}
    versions: dict[Text, Any] = {}
    command: Text = ""
    date: Text = ""
    config: dict[Text, Any] = {}
    cells: tuple[Cell, ...]
    comparisons: Comparisons = Comparisons()
    overlap: Overlap = Overlap()
    dev_overlap: Overlap = Overlap()
    test_dev_overlap: Overlap = Overlap()
    train_targets: int = 0

    @property
    def differences(self) -> tuple[Difference, ...]:
        """The differences that are complete."""
        return tuple(point for point in self.comparisons.points if point.is_complete)


def losses_of(events: Sequence[Mapping[str, Any]], kind: str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and losses of one kind of event of a training log.

    Losses that are missing or not finite are left out, and of a step that was done twice the later one counts.
    """
    losses: dict[int, float] = {}
    for event in events:
        step, loss = event.get("step"), event.get(key)
        if event.get("event") == kind and step is not None and loss is not None and math.isfinite(loss):
            losses[int(step)] = float(loss)
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]
