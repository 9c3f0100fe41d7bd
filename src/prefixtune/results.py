"""What an evaluation came to: one model for `evaluate`, its files, the report and the model card."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

EVALUATION_FILE, OUTPUTS_FILE = "evaluation.json", "outputs.jsonl"

Number = Annotated[float, BeforeValidator(lambda value: math.nan if value is None else value)]
"""A number. What is not finite is null in a file, and read as not a number."""


class Stored(BaseModel):
    """A JSON object in a file; keys that it does not know are kept."""

    model_config = ConfigDict(
        frozen=True, extra="allow", validate_by_name=True, validate_by_alias=True, serialize_by_alias=True
    )


class Score(Stored):
    """One figure, and how it was computed.

    Attributes:
        name: The metric's usual name.
        score: The figure, on the metric's usual scale.
        implementation: Library, version and settings, or this package and the definition in short. Figures of different
            implementations cannot be compared.
        higher_is_better: False for error rates.
        interval: Low and high end of a confidence interval, if one was requested.
    """

    name: str = Field(default="", exclude=True)
    score: Number
    implementation: str = ""
    higher_is_better: bool = True
    interval: tuple[Number, Number] | None = None


class GroupScores(Stored):
    """The scores of a part of the examples.

    Attributes:
        num_examples: How many examples the part has.
        scores: By metric.
    """

    num_examples: int = 0
    scores: dict[str, Score] = {}


class Overlap(Stored, extra="ignore"):
    """How many test sources are also in another set.

    Attributes:
        count: How many.
        num_examples: All of them.
        train: The name of the other set.
    """

    count: int = 0
    num_examples: int = 0
    train: str = ""

    def __str__(self) -> str:
        share = f"{self.count:,} of {self.num_examples:,} test sources ({self.count / max(1, self.num_examples):.1%})"
        return f"{share} are also in the training set {self.train!r}: the scores say less about new texts"


class Comparison(Stored):
    """Two systems on the same items.

    Attributes:
        name: The metric's name.
        first: The first system's score.
        second: The second system's score.
        difference: The first score minus the second.
        p_value: How often the difference is at least as large after the systems' outputs are exchanged at random, item
            by item; never 0.
        samples: How many random exchanges were tried.
        higher_is_better: False for error rates.
        method: The name of the test.
    """

    name: str = Field(default="", exclude=True)
    first: Number
    second: Number
    difference: Number
    p_value: Number
    samples: int
    higher_is_better: bool = True
    method: str


class Against(Stored):
    """A second system, scored on the same examples.

    Attributes:
        outputs: The file of its outputs.
        scores: By metric.
        comparison: By metric.
    """

    outputs: str
    scores: dict[str, Score]
    comparison: dict[str, Comparison]


class OutputRow(Stored):
    """A line of `outputs.jsonl`: an example, and what was written for it."""

    number: int
    source: str = ""
    references: tuple[str, ...] = ()
    output: str = ""
    groups: dict[str, Any] = {}


class Evaluation(Stored):
    """Scores, what they are of, and the outputs that they were computed on.

    Attributes:
        title: A line for people.
        task: Its name.
        data: The file's name.
        split: Of the data, if it has several.
        method: How the model was trained, or asked.
        backbone: The model.
        prefix: The file.
        num_examples: That were scored.
        scores: By metric; each names its implementation.
        groups: Grouping -> group -> its scores, if examples are grouped (category, seen or unseen, ...).
        left_out: Metric -> why it could not be computed.
        num_truncated: Sources that were truncated to fit.
        num_unended: Outputs that took all tokens they may have and did not end.
        seconds: How long decoding took, or predicting labels or tags; of an evaluation that was stopped and continued,
            the whole time.
        settings: Of decoding, and the text format.
        overlap: With the training set, if that is known.
        against: A second system, if there is one.
        machine: Where it was made.
        versions: Of the libraries.
        outputs: One per example; in a file of their own.
    """

    kind: Literal["evaluation"] = "evaluation"
    title: str = ""
    task: str = ""
    data: str = ""
    split: str | None = None
    method: str = ""
    backbone: str = ""
    prefix: str | None = None
    num_examples: int = 0
    scores: dict[str, Score]
    groups: dict[str, dict[str, GroupScores]] = {}
    left_out: dict[str, str] = {}
    num_truncated: int = Field(default=0, alias="num_cut")
    num_unended: int = 0
    seconds: Number = math.nan
    settings: dict[str, Any] = {}
    overlap: Overlap | None = None
    against: Against | None = None
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    outputs: tuple[str, ...] = Field(default=(), exclude=True, repr=False)

    def with_facts(self, **facts: Any) -> Evaluation:
        """The same with other fields, and with what else belongs to it."""
        return Evaluation.model_validate({**dict(self), **facts})

    def summary(self) -> dict[str, Any]:
        """What a program needs of it, as JSON: scores, what they are of, and what is to be known of them."""
        left = {"title", "data", "split", "method", "backbone", "seconds", "settings", "machine", "versions", "kind"}
        summary: dict[str, Any] = json.loads(self.model_dump_json(exclude=left))
        return summary
