"""Where jobs stand, asked for in a thread of its own, so that training goes on while the database is away."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

from prefixtune.jobs.job import JobStatus
from prefixtune.jobs.queue import QueueUnavailableError, Standing

__all__ = ["StatusReport", "StatusWatch"]

_POLLING_SECONDS = 0.5


@dataclass(frozen=True)
class StatusReport:
    """One answer of the database.

    Attributes:
        asked: When it was asked, by `time.monotonic()`: what was so before is known to it.
        job_ids: What it was asked about.
        standings: Where these jobs stand; those that do not exist are left out.
    """

    asked: float = -1.0
    job_ids: frozenset[str] = frozenset()
    standings: Mapping[str, Standing] = field(default_factory=dict)

    def status(self, job_id: str) -> JobStatus | None:
        """Where a job stands; None: it does not exist, or was not asked about."""
        standing = self.standings.get(job_id)
        return None if standing is None else standing.status


class StatusWatch:
    """Asks where some jobs stand again and again.

    Args:
        ask: The queue's `standings`.
        on_away: Called once when the database cannot be reached, with the reason, and with None when it is back.
    """

    def __init__(
        self,
        ask: Callable[[Sequence[str]], Mapping[str, Standing]],
        on_away: Callable[[str | None], None] = lambda reason: None,
    ) -> None:
        self._ask, self._on_away = ask, on_away
        self._job_ids: frozenset[str] = frozenset()
        self._wake, self._stopped = threading.Event(), threading.Event()
        self._is_away = False
        self.latest = StatusReport()
        self._thread = threading.Thread(target=self._poll, name="prefixtune-statuses", daemon=True)

    def start(self) -> None:
        """Begin to ask."""
        self._thread.start()

    def watch(self, job_ids: Collection[str], *, at_once: bool = False) -> None:
        """Ask about these jobs from now on.

        Args:
            job_ids: Their ids.
            at_once: Ask now, not only when it is time again.
        """
        self._job_ids = frozenset(job_ids)
        if at_once:
            self._wake.set()

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()
        self._wake.set()

    def _poll(self) -> None:
        while not self._stopped.is_set():
            self._wake.clear()
            if job_ids := self._job_ids:
                asked = time.monotonic()
                try:
                    self.latest = StatusReport(asked, job_ids, dict(self._ask(sorted(job_ids))))
                    self._note(None)
                except QueueUnavailableError as error:
                    self._note(error.message)
                except Exception as error:
                    # Without this thread no job would ever end.
                    self._note(repr(error))
            self._wake.wait(_POLLING_SECONDS)

    def _note(self, reason: str | None) -> None:
        if (reason is not None) != self._is_away:
            self._is_away = reason is not None
            self._on_away(reason)
