"""What runs and evaluations came to: fields and their types as in their files."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from prefixtune.errors import DataError

__all__ = ["Evaluation", "Event", "GroupScores", "Output", "Run", "Score", "losses_of", "read_results"]


_WRITE_AGAIN = "write it again with the command that made it."

Finite = Annotated[
    float | None,
    BeforeValidator(lambda value: None if isinstance(value, float) and not math.isfinite(value) else value),
]
"""A number; None where it is missing or not finite."""


class Stored(BaseModel):
    """A JSON object in a file; unknown keys are ignored."""

    model_config = ConfigDict(frozen=True)


class Score(Stored):
    """A score."""

    score: Finite = None
    implementation: str = ""
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True


class GroupScores(Stored):
    """The scores of a part of the examples."""

    num_examples: int = 0
    scores: dict[str, Score] = {}


class Output(Stored):
    """The output for one example."""

    index: int = Field(0, alias="number")
    source: str = ""
    references: tuple[str, ...] = ()
    output: str = ""
    groups: dict[str, Any] = {}


class Overlap(Stored):
    """How many test sources are also in the training set."""

    count: int = 0
    num_examples: int = 0
    train: str = ""

    def __str__(self) -> str:
        """In words; empty: none, or it is not known."""
        if self.count < 1 or self.num_examples < 1:
            return ""
        share = f"{self.count:,} of {self.num_examples:,} test sources ({self.count / self.num_examples:.1%})"
        return f"{share} are also in the training set {self.train!r}"


class Evaluation(Stored):
    """An `evaluation.json` and the outputs of its `outputs.jsonl`."""

    title: str = ""
    task: str = ""
    data: str = ""
    split: str | None = ""
    num_examples: int = 0
    method: str = ""
    backbone: str = ""
    prefix: str | None = ""
    left_out: dict[str, Any] = {}
    scores: dict[str, Score]
    groups: dict[str, dict[str, GroupScores]] = {}
    seconds: Finite = None
    settings: dict[str, Any] = {}
    machine: dict[str, Any] = {}
    versions: dict[str, Any] = {}
    outputs: tuple[Output, ...] = Field((), repr=False)
    overlap: Overlap | None = None


class Event(Stored):
    """A line of a training log: what of it must be a number, and everything else as it is."""

    model_config = ConfigDict(extra="allow")

    event: str = ""
    step: Finite = None
    loss: Finite = None
    loss_per_token: Finite = None
    seconds: Finite = None
    best_loss: Finite = None
    num_trained: Finite = None
    num_stored: Finite = None


class Run(Stored):
    """A training run, an evaluation, or both.

    Attributes:
        path: Its folder.
        config: The configuration of the training; empty where nothing was trained.
        events: The log, without a last line that was cut off.
        file_bytes: Size of what was trained: the prefix, or the weights.
    """

    path: Path
    config: dict[str, Any] = {}
    events: tuple[dict[str, Any], ...] = Field((), repr=False)
    evaluation: Evaluation | None = None
    file_bytes: int | None = None


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


# --- reading ----------------------------------------------------------------------------------------------------------


def read_results(path: Path) -> Run:
    """Read a folder of `prefixtune train` or `prefixtune evaluate --output`.

    Raises:
        DataError: It is none of these, or a file in it is broken.
    """
    path = Path(path)
    log, scores = path / "events.jsonl", path / "evaluation.json"
    if not (log.is_file() or scores.is_file()):
        raise DataError(
            f"{str(path)!r} {'holds no run' if path.is_dir() else 'is no folder'}; a training run has an events.jsonl, "
            "and an evaluation an evaluation.json.",
            hint="give a folder that `prefixtune train` or `prefixtune evaluate --output` wrote.",
        )
    config = _config(path / "config.toml") if (path / "config.toml").is_file() else {}
    events = tuple(_events(log)) if log.is_file() else ()
    # The log names the backbone that was used; one given as an object may be another than the configuration's.
    used = next((event.get("backbone") for event in events if event.get("event") == "start"), None)
    trained = [path / name for name in ("prefix.safetensors", "weights.safetensors") if (path / name).is_file()]
    return Run(
        path=path,
        config={**config, "backbone": used} if config and isinstance(used, str) else config,
        events=events,
        evaluation=_evaluation(scores) if scores.is_file() else None,
        file_bytes=trained[0].stat().st_size if trained and events else None,
    )


def _config(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(_text(path))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r}: {error}", hint="correct the line.") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint="check the file.") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    yield from ((number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip())


def _events(path: Path) -> Iterator[dict[str, Any]]:
    lines = list(_lines(path))
    for number, line in lines:
        try:
            yield Event.model_validate_json(line).model_dump(exclude_unset=True)
        except ValidationError as error:
            # A log that is still written may end within a line.
            if number == lines[-1][0]:
                return
            raise DataError(f"line {number} of {str(path)!r}: {error}", hint="remove the line.") from error


def _evaluation(path: Path) -> Evaluation:
    outputs: list[Output] = []
    stored = path.with_name("outputs.jsonl")
    for number, line in _lines(stored) if stored.is_file() else ():
        try:
            outputs.append(Output.model_validate_json(line))
        except ValidationError as error:
            raise DataError(f"line {number} of {str(stored)!r}: {error}", hint=_WRITE_AGAIN) from error
    try:
        return Evaluation.model_validate({**json.loads(_text(path)), "outputs": outputs})
    except (ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{str(path)!r}: {error}", hint=_WRITE_AGAIN) from error
