"""What a job's owner sees while it runs: a log of events that only grows, and how far it is.

Any number of processes may read while one writes. A line that a kill cut off is left out by readers, and ended before
the next one is written.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.jobs.folder import JobFolder
from prefixtune.utils.files import append_line, reporting_write_errors

_MAX_LOG_BYTES, _MAX_PROGRESS_BYTES = 2**24, 2**12
"""Bytes of a log that are read: its last ones; and of the progress."""
_LOG, _PROGRESS = "events.jsonl", "progress.json"
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
        total_steps: Optimizer steps that are planned; 0: not known yet.
        loss: Of the last step, in nats per token; None: there was none yet.
        seconds_left: Until it is over, as far as its steps tell; None: not known, as before the first step of a worker.
        updated: When this was written, in seconds since 1970.
        trained_tokens: Tokens of the steps taken, as they were counted for the loss.
    """

    model_config = ConfigDict(frozen=True)

    step: int = Field(ge=0)
    total_steps: int = Field(ge=0)
    loss: float | None = None
    seconds_left: float | None = None
    updated: int = 0
    trained_tokens: int = Field(default=0, ge=0)


class JobEvents:
    """The events and the progress of a job.

    Args:
        folder: Of the job.
    """

    def __init__(self, folder: JobFolder) -> None:
        self._job, self._log, self._progress = folder.root.name, folder.root / _LOG, folder.root / _PROGRESS
        self._known: set[str] | None = None

    # --- reading ------------------------------------------------------------------------------------------------------

    def read(self) -> list[JobEvent]:
        """The events, the oldest first; of a very long log, the last ones."""
        try:
            with self._log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(size - _MAX_LOG_BYTES, 0))
                return list(_parse(file.read(_MAX_LOG_BYTES)))
        except FileNotFoundError:
            return []

    def progress(self) -> Progress | None:
        """How far the job is; None: it has not begun."""
        try:
            with self._progress.open("rb") as file:
                return Progress.model_validate_json(file.read(_MAX_PROGRESS_BYTES))
        except (OSError, ValidationError):
            return None

    # --- writing ------------------------------------------------------------------------------------------------------

    def add(
        self,
        message: str,
        *,
        level: EventLevel = "info",
        data: dict[str, Any] | None = None,
        key: str = "",
    ) -> None:
        """Append an event.

        Args:
            message: What happened.
            level: How serious it is.
            data: Figures of a step.
            key: Tells what happens at most once, such as a step: it is not written again by whoever does it again;
                empty: it may happen any number of times.

        Raises:
            PrefixError: The log cannot be written.
        """
        if self._known is None:
            self._known = {event.id for event in self.read()}
        digest = hashlib.sha256(f"{self._job}/{key}".encode()).hexdigest()[:24]
        event_id = f"ftevent-{digest if key else secrets.token_hex(12)}"
        if event_id in self._known:
            return
        event = JobEvent(
            id=event_id,
            created=int(time.time()),
            level=level,
            message=message,
            type="message" if data is None else "metrics",
            data=data or {},
        )
        append_line(self._log, event.model_dump_json())
        self._known.add(event_id)

    def write_progress(self, progress: Progress) -> None:
        """Replace the progress; a reader sees the old one or the new one.

        Raises:
            PrefixError: It cannot be written.
        """
        # Not flushed to disk: it tells nothing that the next step does not tell anew.
        temporary = self._progress.with_name(f".{_PROGRESS}.tmp")
        with reporting_write_errors(self._progress):
            temporary.write_text(progress.model_dump_json(), encoding="utf-8")
            os.replace(temporary, self._progress)


def _parse(lines: bytes) -> Iterator[JobEvent]:
    """The events of whole lines; what is none is left out."""
    for line in lines.split(b"\n"):
        try:
            event: dict[str, Any] = json.loads(line)
            yield JobEvent.model_validate(event)
        except (ValueError, RecursionError):
            continue
