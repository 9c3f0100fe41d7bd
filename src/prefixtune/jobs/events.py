"""What a job's owner sees while it runs: a log of events that only grows, and how far it is by the last of them.

Any number of processes may read while one writes. A line that a kill cut off is left out by readers, and ended before
the next one is written. What is done again after a kill is written again under the same id, and read once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.jobs.folder import JobFolder
from prefixtune.utils.files import append_line

_LOG_BYTES, _TAIL_BYTES = 2**24, 2**16
"""Bytes of a log that are read, its last ones: for a list, and for the progress."""
EventLevel = Literal["info", "warn", "error"]


class JobEvent(BaseModel):
    """Something that happened to a job.

    Attributes:
        id: `ftevent-...`.
        created: When, in seconds since 1970.
        level: How serious it is.
        message: For people; it names no path.
        type: `metrics` for figures of a step, which are in `data`.
        data: Of metrics: `step`, `total_steps`, and `train_loss` or `valid_loss` in nats per token, among others.
    """

    model_config = ConfigDict(frozen=True)

    id: str
    created: int
    level: EventLevel = "info"
    message: str
    type: Literal["message", "metrics"] = "message"
    data: dict[str, Any] = Field(default_factory=dict)


class Progress(BaseModel):
    """How far a job is.

    Attributes:
        step: Optimizer steps taken.
        total_steps: Optimizer steps that are planned.
        loss: Of the last step, in nats per token.
        seconds_left: Until it is over, as far as the steps of its worker tell.
        updated: When this was written, in seconds since 1970.
        trained_tokens: Tokens of the steps taken, as they were counted for the loss.
    """

    step: int
    total_steps: int = 0
    loss: float | None = None
    seconds_left: float | None = None
    updated: int = 0
    trained_tokens: int = 0


class JobEvents:
    """The events of a job.

    Args:
        folder: Of the job.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._job, self._log = folder.root.name, folder.root / "events.jsonl"

    def read(self) -> list[JobEvent]:
        """The events, the oldest first; of a very long log, the last ones."""
        known: dict[str, JobEvent] = {}
        for event in self._last(_LOG_BYTES):
            known.setdefault(event.id, event)
        return list(known.values())

    def progress(self) -> Progress | None:
        """How far the job is; None: it has taken no step."""
        steps = [event for event in self._last(_TAIL_BYTES) if "train_loss" in event.data]
        if not steps:
            return None
        last = steps[-1]
        return Progress(**{**last.data, "loss": last.data["train_loss"], "updated": last.created})

    def add(
        self, message: str, *, level: EventLevel = "info", data: dict[str, Any] | None = None, key: str = ""
    ) -> None:
        """Append an event.

        Args:
            message: What happened.
            level: How serious it is.
            data: Figures of a step.
            key: Names what happens at most once, such as a step: of two events with one key, the first is read; empty:
                it may happen any number of times.

        Raises:
            PrefixError: The log cannot be written.
        """
        digest = hashlib.sha256(f"{self._job}/{key}".encode()).hexdigest()[:24]
        event = JobEvent(
            id=f"ftevent-{digest if key else secrets.token_hex(12)}",
            created=int(time.time()),
            level=level,
            message=message,
            type="message" if data is None else "metrics",
            data=data or {},
        )
        append_line(self._log, event.model_dump_json())

    def _last(self, size: int) -> Iterator[JobEvent]:
        """The events of the log's last bytes; what is no whole event is left out."""
        try:
            with self._log.open("rb") as file:
                file.seek(max(file.seek(0, os.SEEK_END) - size, 0))
                lines = file.read(size).split(b"\n")
        except FileNotFoundError:
            return
        for line in lines:
            try:
                yield JobEvent.model_validate_json(line)
            except ValidationError:
                continue
