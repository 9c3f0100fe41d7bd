"""Folders of runs, evaluations and studies, read and checked.

Knows the files' layout, and nothing of what a report makes of them. Missing and non-finite figures are read as None;
anything else that is not as it should be is an error that names its file.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from prefixtune.errors import DataError

__all__ = ["Cell", "Difference", "Evaluation", "Group", "Measure", "Output", "Run", "Study", "read_results"]


T = TypeVar("T")
STATUSES = ("done", "failed", "waiting")


@dataclass(frozen=True)
class Measure:
    """A score; None where it is missing or not finite."""

    score: float | None
    implementation: str = ""
    interval: tuple[float, float] | None = None
    higher_is_better: bool = True


@dataclass(frozen=True)
class Group:
    """The scores of a part of the examples."""

    num_examples: int
    scores: Mapping[str, Measure]


@dataclass(frozen=True)
class Output:
    """What one example came to."""

    number: int
    source: str
    references: tuple[str, ...]
    output: str
    groups: Mapping[str, str]


@dataclass(frozen=True)
class Evaluation:
    """An `evaluation.json` with the outputs beside it; fields as in the file."""

    title: str
    task: str
    data: str
    split: str
    num_examples: int
    method: str
    backbone: str
    prefix: str
    left_out: Mapping[str, str]
    scores: Mapping[str, Measure]
    groups: Mapping[str, Mapping[str, Group]]
    seconds: float | None
    settings: Mapping[str, Any]
    machine: Mapping[str, Any]
    versions: Mapping[str, Any]
    outputs: tuple[Output, ...] = field(repr=False)
    overlap: str = ""


@dataclass(frozen=True)
class Run:
    """A folder of a training run, of an evaluation, or of both.

    Attributes:
        path: As it was given.
        config: The run's configuration; empty where nothing was trained.
        events: Its log, without a last line that was cut off.
        file_bytes: Of what was trained: the prefix, or the weights.
    """

    path: Path
    config: Mapping[str, Any]
    events: tuple[Mapping[str, Any], ...] = field(repr=False)
    evaluation: Evaluation | None
    file_bytes: int | None


@dataclass(frozen=True)
class Cell:
    """One cell of a study: what it varies, and what it came to."""

    id: str
    factors: Mapping[str, Any]
    status: str
    error: str
    figures: Mapping[str, float]
    run: Run | None


@dataclass(frozen=True)
class Difference:
    """A point of a study against its counterpart; of every repetition, and over all of them.

    Attributes:
        point: What the ids of its runs begin with.
        reference: Likewise, of its counterpart.
        part: Of the test set; empty: all of it.
        differences: Of each repetition's score, the point less its counterpart.
        p_values: Of each; None where it was not tested.
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
    """A `study.json` with its cells; fields as in the file."""

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


def read_results(path: Path) -> Study | Run:
    """Read a folder of `prefixtune train`, `prefixtune evaluate --output` or `prefixtune study`.

    Raises:
        DataError: It is none of these, or a file in it is broken.
    """
    path = Path(path)
    if (path / "study.json").is_file():
        return _study(path)
    run = _run(path)
    if run is None:
        inside = sorted(child for child in path.glob("*") if _is_one(child)) if path.is_dir() else []
        raise DataError(
            f"{str(path)!r} {'holds no run' if path.is_dir() else 'is no folder'}; a training run has an events.jsonl, "
            "an evaluation an evaluation.json, and a study a study.json.",
            hint=f"did you mean {str(inside[0])!r}?"
            if inside
            else "give a folder that `prefixtune train`, `prefixtune evaluate --output` or `prefixtune study` wrote.",
        )
    return run


def _is_one(path: Path) -> bool:
    return any((path / name).is_file() for name in ("study.json", "evaluation.json", "events.jsonl"))


class _Record:
    """A JSON object, and the words for where it stands."""

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise _wrong(where, values, "an object")
        self.values, self.where = values, where

    def get(self, key: str, kind: type[T], default: T) -> T:
        """A value of one type; null counts as missing."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise _wrong(f"{key!r} in {self.where}", value, _KINDS[kind])
        return value

    def number(self, key: str) -> float | None:
        """A number; None where it is missing or not finite."""
        return _finite(self.values.get(key), f"{key!r} in {self.where}")

    def record(self, key: str) -> _Record:
        """An object inside."""
        return _Record(self.get(key, dict, {}), f"{key!r} in {self.where}")

    def records(self) -> Iterator[tuple[str, _Record]]:
        """Every value, each an object."""
        for key, value in self.values.items():
            yield key, _Record(value, f"{key!r} in {self.where}")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.get(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise _wrong(f"{key!r} in {self.where}", values, "a list of strings")
        return tuple(values)


_KINDS: dict[type, str] = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
_KINDS[list] = "a list"


def _wrong(where: str, value: object, allowed: str) -> DataError:
    return DataError(
        f"{where} is {str(value)[:60]!r}, but must be {allowed}.", hint="write it again with the command that made it."
    )


def _finite(value: object, where: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise _wrong(where, value, "a number")
    return float(value) if math.isfinite(value) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint="check the file.") from error


def _json(path: Path) -> _Record:
    try:
        return _Record(json.loads(_text(path)), repr(str(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{str(path)!r} is no JSON: {error}.", hint="write it again with the command that made it."
        ) from error


def _lines(path: Path, *, may_be_cut: bool = False) -> Iterator[_Record]:
    """Every line's object; a log that is still written may end in the middle of one."""
    lines = _text(path).split("\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"line {number} of {str(path)!r}"
        try:
            yield _Record(json.loads(line), where)
        except (ValueError, RecursionError) as error:
            if may_be_cut and number == len(lines):
                return
            raise DataError(f"{where} is no JSON: {error}.", hint="remove the line, or the file.") from error


def _run(path: Path) -> Run | None:
    config: Mapping[str, Any] = {}
    if (path / "config.toml").is_file():
        try:
            config = tomllib.loads(_text(path / "config.toml"))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{str(path / 'config.toml')!r} is no TOML: {error}.", hint="mend the line.") from error
    has_events, has_scores = (path / "events.jsonl").is_file(), (path / "evaluation.json").is_file()
    if not (has_events or has_scores):
        return None
    events = [_event(line) for line in _lines(path / "events.jsonl", may_be_cut=True)] if has_events else []
    stored = [path / name for name in ("prefix.safetensors", "weights.safetensors")]
    return Run(
        path=path,
        config=config,
        events=tuple(events),
        evaluation=_evaluation(path) if has_scores else None,
        file_bytes=next((file.stat().st_size for file in stored if has_events and file.is_file()), None),
    )


def _event(line: _Record) -> Mapping[str, Any]:
    """An event, its figures checked."""
    for key in ("step", "loss", "loss_per_token", "seconds", "best_loss"):
        line.number(key)
    return line.values


def _evaluation(path: Path) -> Evaluation:
    read = _json(path / "evaluation.json")
    if "scores" not in read.values:
        raise DataError(
            f"{read.where} has no 'scores'.", hint="write it with `prefixtune evaluate --output`, or remove it."
        )
    outputs = path / "outputs.jsonl"
    return Evaluation(
        **{key: read.get(key, str, "") for key in ("title", "task", "data", "split", "method", "backbone", "prefix")},
        num_examples=read.get("num_examples", int, 0),
        left_out={name: str(reason) for name, reason in read.get("left_out", dict, {}).items()},
        scores=_scores(read.record("scores")),
        groups={
            kind: {
                name: Group(group.get("num_examples", int, 0), _scores(group.record("scores")))
                for name, group in groups.records()
            }
            for kind, groups in read.record("groups").records()
        },
        seconds=read.number("seconds"),
        settings=read.get("settings", dict, {}),
        machine=read.get("machine", dict, {}),
        versions=read.get("versions", dict, {}),
        outputs=tuple(map(_output, _lines(outputs))) if outputs.is_file() else (),
        overlap=_overlap(read.record("overlap")),
    )


def _overlap(record: _Record) -> str:
    """How many test sources stand in the training set, in words; empty: none, or it is not known."""
    count, total = record.get("count", int, 0), record.get("num_examples", int, 0)
    if count < 1 or total < 1:
        return ""
    where = record.get("train", str, "")
    return f"{count:,} of {total:,} test sources ({count / total:.1%}) stand in the training set {where!r}, too"


def _scores(record: _Record) -> dict[str, Measure]:
    return {
        name: Measure(
            given.number("score"),
            given.get("implementation", str, ""),
            _interval(given),
            given.get("higher_is_better", bool, True),
        )
        for name, given in record.records()
    }


def _interval(record: _Record) -> tuple[float, float] | None:
    pair = record.get("interval", list, [])
    if not pair:
        return None
    ends = [_finite(value, f"'interval' in {record.where}") for value in pair]
    if len(ends) != 2:
        raise _wrong(f"'interval' in {record.where}", pair, "two numbers")
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def _output(line: _Record) -> Output:
    return Output(
        number=line.get("number", int, 0),
        source=line.get("source", str, ""),
        references=line.strings("references"),
        output=line.get("output", str, ""),
        groups={key: str(value) for key, value in line.get("groups", dict, {}).items()},
    )


def _study(path: Path) -> Study:
    read = _json(path / "study.json")
    folders = sorted(folder for folder in (path / "cells").glob("*") if folder.is_dir())
    if not folders:
        raise DataError(
            f"the study {str(path)!r} has no cells.", hint="run it with `prefixtune study` and this folder first."
        )
    compared = path / "comparisons.json"
    comparisons = _json(compared) if compared.is_file() else _Record({}, repr(str(compared)))
    return Study(
        path=path,
        differences=tuple(_differences(comparisons)),
        difference_test=comparisons.get("test", str, ""),
        **{
            key: read.get(key, str, "")
            for key in ("name", "title", "task", "backbone", "axis", "metric", "command", "date")
        },
        factors=read.strings("factors"),
        budget_minutes=read.number("budget_minutes"),
        cut=read.strings("cut"),
        tuning=read.get("tuning", dict, {}),
        machine=read.get("machine", dict, {}),
        versions=read.get("versions", dict, {}),
        config=read.get("config", dict, {}),
        cells=tuple(map(_cell, folders)),
        overlap=_overlap(read.record("overlap")),
    )


def _differences(record: _Record) -> Iterator[Difference]:
    for number, values in enumerate(record.get("points", list, [])):
        point = _Record(values, f"point {number} of {record.where}")
        differences = [
            _finite(value, f"'differences' in {point.where}") for value in point.get("differences", list, [])
        ]
        p_values = [_finite(value, f"'p_values' in {point.where}") for value in point.get("p_values", list, [])]
        mean = point.number("mean")
        if mean is None or None in differences or len(p_values) != len(differences):
            continue
        yield Difference(
            **{key: point.get(key, str, "") for key in ("point", "reference", "part")},
            differences=tuple(value for value in differences if value is not None),
            p_values=tuple(p_values),
            mean=mean,
            standard_error=point.number("standard_error"),
        )


def _cell(folder: Path) -> Cell:
    """A cell; one that has no `cell.json` yet is waiting."""
    run = _run(folder)
    if not (folder / "cell.json").is_file():
        return Cell(folder.name, {}, "waiting", "", {}, run)
    read = _json(folder / "cell.json")
    status = read.get("status", str, "waiting")
    if status not in STATUSES:
        raise _wrong(f"'status' in {read.where}", status, f"one of {', '.join(STATUSES)}")
    figures = read.record("figures")
    return Cell(
        id=read.get("id", str, folder.name),
        factors={
            key: value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
            for key, value in read.record("factors").values.items()
        },
        status=status,
        error=read.get("error", str, ""),
        figures={key: value for key in figures.values if (value := figures.number(key)) is not None},
        run=run,
    )
