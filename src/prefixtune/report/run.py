"""What a folder holds: a training run, an evaluation, or both."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from prefixtune.errors import DataError
from prefixtune.results import EVALUATION_FILE, OUTPUTS_FILE, Evaluation, Number, OutputRow

_Row = TypeVar("_Row")


class Event(BaseModel):
    """A line of a training log: what of it must be a number, and everything else as it is."""

    model_config = ConfigDict(extra="allow")

    event: str = ""
    step: Number = math.nan
    loss: Number = math.nan
    loss_per_token: Number = math.nan
    seconds: Number = math.nan
    best_loss: Number = math.nan
    num_trained: Number = math.nan
    num_stored: Number = math.nan


@dataclass(frozen=True)
class Run:
    """A training run, an evaluation, or both.

    Attributes:
        path: Its folder.
        config: The configuration of the training; empty where nothing was trained.
        events: The log, without a last line that was cut off.
        evaluation: Its scores; None: it was not evaluated.
        outputs: That were scored.
        file_bytes: Size of what was trained: the prefix, or the weights.
    """

    path: Path
    config: Mapping[str, Any] = field(default_factory=dict)
    events: Sequence[Mapping[str, Any]] = ()
    evaluation: Evaluation | None = None
    outputs: Sequence[OutputRow] = ()
    file_bytes: int | None = None


def read_results(path: Path) -> Run:
    """Read a folder of `prefixtune train` or `prefixtune evaluate --output`.

    Raises:
        DataError: It is none of these, or a file in it is broken.
    """
    path = Path(path)
    config, log, scores, outputs = (
        path / name for name in ("config.toml", "events.jsonl", EVALUATION_FILE, OUTPUTS_FILE)
    )
    if not (log.is_file() or scores.is_file()):
        raise DataError(
            f"{str(path)!r} {'holds no run' if path.is_dir() else 'is no folder'}; a training run has an events.jsonl, "
            "and an evaluation an evaluation.json.",
            hint="give a folder that `prefixtune train` or `prefixtune evaluate --output` wrote.",
        )
    settings = _parse(config, _text(config), tomllib.loads) if config.is_file() else {}
    # A log that is still written may end within a line.
    events = list(_rows(log, _as_event, may_break_off=True)) if log.is_file() else []
    # The log names the backbone that was used; one given as an object may be another than the configuration's.
    used = next((event.get("backbone") for event in events if event.get("event") == "start"), None)
    trained = [path / name for name in ("prefix.safetensors", "weights.safetensors") if (path / name).is_file()]
    return Run(
        path=path,
        config={**settings, "backbone": used} if settings and isinstance(used, str) else settings,
        events=events,
        evaluation=_parse(scores, _text(scores), Evaluation.model_validate_json) if scores.is_file() else None,
        outputs=list(_rows(outputs, OutputRow.model_validate_json)) if outputs.is_file() else [],
        file_bytes=trained[0].stat().st_size if trained and events else None,
    )


def losses_of(events: Sequence[Mapping[str, Any]], kind: str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and losses of one kind of event of a training log.

    Losses that are missing or not finite are left out, and of a step that was done twice the later one counts.
    """
    losses: dict[int, float] = {}
    for event in events:
        step, loss = (math.nan if event.get(name) is None else event[name] for name in ("step", key))
        if event.get("event") == kind and math.isfinite(step) and math.isfinite(loss):
            losses[int(step)] = float(loss)
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


def _as_event(line: str) -> dict[str, Any]:
    return Event.model_validate_json(line).model_dump(exclude_unset=True)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint="check the file.") from error


def _parse(path: Path, text: str, parse: Callable[[str], _Row], where: str = "") -> _Row:
    try:
        return parse(text)
    except (ValueError, TypeError, RecursionError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            reason = "; ".join(faults[:3]).removeprefix(": ")
        hint = "write it again with the command that made it."
        raise DataError(f"{where}{str(path)!r}: {reason}.", hint=hint) from error


def _rows(path: Path, parse: Callable[[str], _Row], *, may_break_off: bool = False) -> Iterator[_Row]:
    lines = [(number, line) for number, line in enumerate(_text(path).split("\n"), start=1) if line.strip()]
    for number, line in lines:
        try:
            yield _parse(path, line, parse, f"line {number} of ")
        except DataError:
            if not may_break_off or number < lines[-1][0]:
                raise
