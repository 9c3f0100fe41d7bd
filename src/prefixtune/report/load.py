"""Read and check the results of runs, evaluations and studies.

Missing and non-finite figures are read as None; anything else that is not as it should be is an error that names its
file.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from prefixtune.errors import DataError
from prefixtune.report.files import WRITE_AGAIN, Files
from prefixtune.report.results import Cell, Comparisons, Evaluation, Event, Output, Run, Stored, Study
from prefixtune.utils.config import describe_fault

__all__ = ["read_results"]


_Stored = TypeVar("_Stored", bound=Stored)


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


def _read_run(files: Files) -> Run | None:
    config = files.toml("config.toml") if files.has("config.toml") else {}
    has_events, has_scores = files.has("events.jsonl"), files.has("evaluation.json")
    if not (has_events or has_scores):
        return None
    lines = files.json_lines("events.jsonl", may_be_cut=True) if has_events else ()
    events = tuple(_parse(Event, line, where).model_dump(exclude_unset=True) for where, line in lines)
    # The log names the backbone that was used; one given as an object may be another than the configuration's.
    used = next((event.get("backbone") for event in events if event.get("event") == "start"), None)
    if config and isinstance(used, str):
        config = {**config, "backbone": used}
    trained = [name for name in ("prefix.safetensors", "weights.safetensors") if has_events and files.has(name)]
    return Run(
        path=files.path,
        config=config,
        events=events,
        evaluation=_read_evaluation(files) if has_scores else None,
        file_bytes=(files.path / trained[0]).stat().st_size if trained else None,
    )


def _read_evaluation(files: Files) -> Evaluation:
    values = files.json("evaluation.json")
    lines = files.json_lines("outputs.jsonl") if files.has("outputs.jsonl") else ()
    outputs = tuple(_parse(Output, line, where) for where, line in lines)
    return _parse(Evaluation, {**values, "outputs": outputs}, _name(files, "evaluation.json"))


def _read_study(files: Files) -> Study:
    values, folders = files.json("study.json"), files.folders("cells")
    if not folders:
        raise DataError(
            f"the study {str(files.path)!r} has no cells.", hint="run it with `prefixtune study` and this folder first."
        )
    stored = files.json("comparisons.json") if files.has("comparisons.json") else {}
    added = {
        "path": files.path,
        "cells": tuple(map(_read_cell, folders)),
        "comparisons": _parse(Comparisons, stored, _name(files, "comparisons.json")),
    }
    return _parse(Study, values | added, _name(files, "study.json"))


def _read_cell(files: Files) -> Cell:
    """A cell; one that has no `cell.json` yet is waiting."""
    run = _read_run(files)
    values = files.json("cell.json") if files.has("cell.json") else {}
    return _parse(Cell, {**values, "id": values.get("id") or files.path.name, "run": run}, _name(files, "cell.json"))


def _name(files: Files, name: str) -> str:
    return repr(str(files.path / name))


def _parse(model: type[_Stored], values: Mapping[str, Any], where: str) -> _Stored:
    """Check an object of a file.

    Raises:
        DataError: A value is missing or of another type.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        fault = error.errors(include_url=False)[0]
    names = [f"item {part + 1}" if isinstance(part, int) else repr(part) for part in reversed(fault["loc"])]
    raise DataError(f"{describe_fault(fault, ' in '.join([*names, where]))}.", hint=WRITE_AGAIN)
