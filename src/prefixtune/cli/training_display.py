"""A training on a server, shown to people: nothing that the server says steers the terminal."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

from prefixtune.cli.training_client import Event, JobView
from prefixtune.utils.console import Console, format_seconds, safe_text

__all__ = ["Follower", "facts_of", "one_line", "status_of", "time_of"]


class Follower:
    """Shows the events of a job: steps as progress, and the rest as lines.

    Args:
        console: Where.
        stack: Ends the progress.
    """

    def __init__(self, console: Console, stack: contextlib.ExitStack) -> None:
        self._console, self._stack = console, stack
        self._on_step: Callable[..., None] | None = None

    def show(self, event: Event) -> None:
        """Show one event."""
        data = event.data or {}
        step, total = data.get("step"), data.get("total_steps")
        if event.type == "metrics" and isinstance(step, int):
            if self._on_step is None:
                known = isinstance(total, int) and total > 0
                bar = self._console.progress("training", total if known else None)
                self._on_step = self._stack.enter_context(bar).update
            self._on_step(step, **_figures(data))
        elif event.level == "error":
            self._console.error(one_line(event.message))
        else:
            self._console.info(one_line(event.message))


def status_of(job: JobView) -> str:
    """Where a job stands, and how far it is."""
    progress, before = job.prefixtune.get("progress"), job.prefixtune.get("position")
    if job.status == "queued" and isinstance(before, int):
        return f"queued, {before:,} before it"
    if not isinstance(progress, dict) or job.has_ended:
        return job.status
    step, total = progress.get("step"), progress.get("total_steps")
    if isinstance(step, int) and isinstance(total, int) and total > 0:
        return f"{job.status}, {100 * step // total} %"
    return job.status


def facts_of(job: JobView) -> Iterator[tuple[str, str]]:
    """What is known of a job, each fact with its name."""
    yield "job", safe_text(job.id)
    yield "status", safe_text(status_of(job))
    if job.name:
        yield "name", safe_text(job.name)
    yield "model", safe_text(job.model)
    yield "created", time_of(job.created_at)
    if job.finished_at is not None:
        yield "finished", time_of(job.finished_at)
    elif job.estimated_finish is not None:
        left = max(0, job.estimated_finish - time.time())
        yield "ready", f"in about {format_seconds(left)}"
    if job.error is not None and job.error.message:
        yield "error", one_line(job.error.message)


def _figures(data: dict[str, Any]) -> dict[str, float]:
    names = {"train_loss": "loss", "valid_loss": "validation_loss"}
    return {shown: float(value) for name, shown in names.items() if isinstance(value := data.get(name), int | float)}


def one_line(text: str) -> str:
    """A text from a server as one line, cut."""
    return " ".join(safe_text(text[:2_000]).split())


def time_of(seconds: int) -> str:
    """A time in seconds since 1970, as it is here."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (ValueError, OverflowError, OSError):
        return str(seconds)
