"""The files of a run's folder, and its log of events."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from prefixtune.errors import CheckpointError, ConfigError

CONFIG_FILE, EVENTS_FILE, STATE_FILE = "config.toml", "events.jsonl", "state.safetensors"

EARLIER_STATE_FILE = "state-before.safetensors"
"""The state before the last one, of runs that see each other: a kill may come between their saves."""

PREFIX_FILE, WEIGHTS_FILE = "prefix.safetensors", "weights.safetensors"
"""The artifact of a run: of a prefix, or of a method that trains the model's own weights."""

Event = dict[str, Any]
"""What happened: `event` is start, resume, step, evaluation, save or end; the rest are figures."""


def has_state(folder: Path) -> bool:
    """Whether a folder holds a state to go on from."""
    return any((folder / name).exists() for name in (STATE_FILE, EARLIER_STATE_FILE))


def check_unused(folder: Path) -> None:
    """Refuse a folder that holds a run.

    Raises:
        ConfigError: It does.
    """
    resume = "go on with --resume (resume=True), " * has_state(folder)
    if resume or any((folder / name).exists() for name in (PREFIX_FILE, WEIGHTS_FILE)):
        hint = f"{resume}choose another --output (output), or delete it."
        raise ConfigError(f"{str(folder)!r} already holds a run.", hint=hint)


def read_events(path: Path, step: int | None = None) -> list[Event]:
    """The log's events up to a step, or all; a last line that a kill has cut off is left out.

    Raises:
        CheckpointError: Another line is damaged.
    """
    events: list[Event] = []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            event = json.loads(line)
            comes_again, reached = event["event"] in ("end", "resume"), int(event.get("step", 0))
        except (ArithmeticError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(lines):
                break
            raise CheckpointError(
                f"line {number} of {str(path)!r} is no event of a training run: {line[:40]!r}.",
                hint="delete the file: the run goes on from its state, with a new log.",
            ) from error
        if (step is None or reached <= step) and not comes_again:
            events.append(event)
    return events
