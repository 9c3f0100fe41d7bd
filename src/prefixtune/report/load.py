"""Read and check the results of runs, evaluations and studies.

Missing and non-finite figures are read as None; anything else that is not as it should be is an error that names its
file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from prefixtune.errors import DataError
from prefixtune.report.files import Files, Record, wrong_value
from prefixtune.report.results import (
    Cell,
    CellStatus,
    Difference,
    Evaluation,
    GroupScores,
    Output,
    Run,
    Score,
    Study,
)

__all__ = ["read_results"]


def read_results(path: Path) -> Study | Run:
    """Read a folder of `prefixtune train`, `prefixtune evaluate --output` or `prefixtune study`, or a study in a file.

    Raises:
        DataError: It is none of these, or a file in it is broken.
    """
    path = Path(path)
    try:
        files = Files.open(path)
    except DataError as error:
        if path.suffix == ".json":
            raise
        raise _no_results(path) from error
    if files.has("study.json"):
        return _read_study(files)
    run = _read_run(files)
    if run is None:
        raise _no_results(path)
    return run


def _no_results(path: Path) -> DataError:
    problem = "holds no study" if path.is_file() else "holds no run" if path.is_dir() else "does not exist"
    inside = sorted(folder for folder in path.glob("*") if _has_results(folder)) if path.is_dir() else []
    return DataError(
        f"{str(path)!r} {problem}; a training run has an events.jsonl, an evaluation an evaluation.json, and a study a "
        "study.json.",
        hint=f"did you mean {str(inside[0])!r}?"
        if inside
        else "give a folder that `prefixtune train`, `prefixtune evaluate --output` or `prefixtune study` wrote.",
    )


def _has_results(path: Path) -> bool:
    return any((path / name).is_file() for name in ("study.json", "evaluation.json", "events.jsonl"))


# --- a run ------------------------------------------------------------------------------------------------------------


def _read_run(files: Files) -> Run | None:
    config: Mapping[str, Any] = files.toml("config.toml") if files.has("config.toml") else {}
    has_events, has_scores = files.has("events.jsonl"), files.has("evaluation.json")
    if not (has_events or has_scores):
        return None
    events = [_checked_event(line) for line in files.json_lines("events.jsonl", may_be_cut=True)] if has_events else []
    trained = [name for name in ("prefix.safetensors", "weights.safetensors") if has_events and files.has(name)]
    return Run(
        path=files.path,
        config=config,
        events=tuple(events),
        evaluation=_read_evaluation(files) if has_scores else None,
        file_bytes=files.size(trained[0]) if trained else None,
    )


def _checked_event(line: Record) -> Mapping[str, Any]:
    for key in ("step", "loss", "loss_per_token", "seconds", "best_loss"):
        line.number(key)
    return line.values


def _read_evaluation(files: Files) -> Evaluation:
    record = files.json("evaluation.json")
    if "scores" not in record.values:
        raise DataError(
            f"{record.where} has no 'scores'.", hint="write it with `prefixtune evaluate --output`, or remove it."
        )
    outputs = files.json_lines("outputs.jsonl") if files.has("outputs.jsonl") else ()
    return Evaluation(
        **{key: record.get(key, str, "") for key in ("title", "task", "data", "split", "method", "backbone", "prefix")},
        num_examples=record.get("num_examples", int, 0),
        left_out={name: str(reason) for name, reason in record.get("left_out", dict, {}).items()},
        scores=_scores(record.record("scores")),
        groups={
            kind: {
                name: GroupScores(group.get("num_examples", int, 0), _scores(group.record("scores")))
                for name, group in groups.records()
            }
            for kind, groups in record.record("groups").records()
        },
        seconds=record.number("seconds"),
        settings=record.get("settings", dict, {}),
        machine=record.get("machine", dict, {}),
        versions=record.get("versions", dict, {}),
        outputs=tuple(map(_output, outputs)),
        overlap=_overlap(record.record("overlap")),
    )


def _overlap(record: Record) -> str:
    """How many test sources are also in the training set, in words; empty: none, or it is not known."""
    count, total = record.get("count", int, 0), record.get("num_examples", int, 0)
    if count < 1 or total < 1:
        return ""
    train = record.get("train", str, "")
    return f"{count:,} of {total:,} test sources ({count / total:.1%}) are also in the training set {train!r}"


def _scores(record: Record) -> dict[str, Score]:
    return {
        name: Score(
            score.number("score"),
            score.get("implementation", str, ""),
            _interval(score),
            score.get("higher_is_better", bool, True),
        )
        for name, score in record.records()
    }


def _interval(record: Record) -> tuple[float, float] | None:
    ends = record.numbers("interval")
    if not ends:
        return None
    if len(ends) != 2:
        raise wrong_value(f"'interval' in {record.where}", record.values["interval"], "two numbers")
    return None if ends[0] is None or ends[1] is None else (ends[0], ends[1])


def _output(line: Record) -> Output:
    return Output(
        index=line.get("number", int, 0),
        source=line.get("source", str, ""),
        references=line.strings("references"),
        output=line.get("output", str, ""),
        groups={key: str(value) for key, value in line.get("groups", dict, {}).items()},
    )


# --- a study ----------------------------------------------------------------------------------------------------------


def _read_study(files: Files) -> Study:
    record = files.json("study.json")
    folders = files.folders("cells")
    if not folders:
        raise DataError(
            f"the study {str(files.path)!r} has no cells.", hint="run it with `prefixtune study` and this folder first."
        )
    comparisons = files.json("comparisons.json") if files.has("comparisons.json") else Record({}, "comparisons.json")
    return Study(
        path=files.path,
        differences=tuple(_differences(comparisons)),
        difference_test=comparisons.get("test", str, ""),
        **{
            key: record.get(key, str, "")
            for key in ("name", "title", "task", "backbone", "axis", "metric", "command", "date")
        },
        factors=record.strings("factors"),
        budget_minutes=record.number("budget_minutes"),
        cut=record.strings("cut"),
        tuning=record.get("tuning", dict, {}),
        machine=record.get("machine", dict, {}),
        versions=record.get("versions", dict, {}),
        config=record.get("config", dict, {}),
        cells=tuple(map(_read_cell, folders)),
        overlap=_overlap(record.record("overlap")),
    )


def _differences(record: Record) -> Iterator[Difference]:
    for index, values in enumerate(record.get("points", list, [])):
        point = Record(values, f"point {index} of {record.where}")
        differences, p_values, mean = point.numbers("differences"), point.numbers("p_values"), point.number("mean")
        if mean is None or None in differences or len(p_values) != len(differences):
            continue
        yield Difference(
            **{key: point.get(key, str, "") for key in ("point", "reference", "part")},
            differences=tuple(value for value in differences if value is not None),
            p_values=tuple(p_values),
            mean=mean,
            standard_error=point.number("standard_error"),
        )


def _read_cell(files: Files) -> Cell:
    """A cell; one that has no `cell.json` yet is waiting."""
    run = _read_run(files)
    if not files.has("cell.json"):
        return Cell(files.path.name, {}, "waiting", "", {}, run)
    record = files.json("cell.json")
    figures = record.record("figures")
    return Cell(
        id=record.get("id", str, files.path.name),
        factors={
            key: value if isinstance(value, str | int | float | bool | None) else json.dumps(value)
            for key, value in record.record("factors").values.items()
        },
        status=_status(record),
        error=record.get("error", str, ""),
        figures={key: value for key in figures.values if (value := figures.number(key)) is not None},
        run=run,
    )


def _status(record: Record) -> CellStatus:
    statuses: tuple[CellStatus, ...] = get_args(CellStatus)
    value = record.get("status", str, "waiting")
    for status in statuses:
        if status == value:
            return status
    raise wrong_value(f"'status' in {record.where}", value, f"one of {', '.join(statuses)}")
