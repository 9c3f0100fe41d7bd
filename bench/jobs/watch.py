"""Looks at jobs and at what is served all the time, and notes what must never be seen."""

from __future__ import annotations

import threading
from pathlib import Path

import torch

from bench.jobs.service import Http
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.jobs.job import ENDED, JobState, JobStatus
from prefixtune.jobs.queue import JobQueue, migrate
from prefixtune.prefix.artifact import read_artifact
from prefixtune.prefix.folder import Signature, list_names, path_of, signature_of
from prefixtune.prefix.header import job_origin

__all__ = ["JobWatcher", "ServedWatcher"]


class _Watcher:
    """Looks again and again in a thread of its own, until it is stopped.

    Attributes:
        faults: What must never be seen.
        looks: How often it has looked.
    """

    def __init__(self, seconds: float) -> None:
        self.faults: list[str] = []
        self.looks = 0
        self._seconds, self._stopped = seconds, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Look a last time, and end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(120)

    def _watch(self) -> None:
        while True:
            is_last = self._stopped.is_set()
            try:
                self.look()
                self.looks += 1
            except Exception as error:
                self.faults.append(f"{type(self).__name__}: {error!r}")
            if is_last:
                return
            self._stopped.wait(self._seconds)

    def look(self) -> None:
        """Look once."""
        raise NotImplementedError


class JobWatcher(_Watcher):
    """Where each job stands, by the database itself: one that has ended stays as it ended.

    Attributes:
        states: Job id -> as it stood last.
        changes: Job id -> its statuses in turn.
    """

    def __init__(self, database_url: str, seconds: float = 0.1) -> None:
        super().__init__(seconds)
        self._url = database_url
        self._queue: JobQueue | None = None
        self.states: dict[str, JobState] = {}
        self.changes: dict[str, list[JobStatus]] = {}

    def close(self) -> None:
        """Look a last time, and close the queue."""
        super().close()
        queue, self._queue = self._queue, None
        if queue is not None:
            queue.close()

    def look(self) -> None:
        """Compare each job with how it stood before."""
        try:
            if self._queue is None:
                migrate(self._url)
                self._queue = JobQueue(self._url)
            found = list(self._queue.iterate())
        except PrefixError:
            return
        for state in found:
            before = self.states.get(state.job.id)
            if before is not None and before.status in ENDED and state != before:
                self.faults.append(f"{state.job.id} had ended as {before.status}, and is {state.status} again")
            changes = self.changes.setdefault(state.job.id, [])
            if not changes or changes[-1] != state.status:
                changes.append(state.status)
            self.states[state.job.id] = state
        for job_id in self.states.keys() - {state.job.id for state in found}:
            self.faults.append(f"{job_id} is gone")
            del self.states[job_id]


class ServedWatcher(_Watcher):
    """Every file in the folder of prefixes, and every listed model: whole at any moment.

    Attributes:
        files: How many different files it has read.
        answered: Requests for a listed model that were answered.
    """

    def __init__(self, prefixes: Path, http: Http, seconds: float = 0.1) -> None:
        super().__init__(seconds)
        self._prefixes, self._http = prefixes, http
        self._read: dict[str, Signature] = {}
        self._asked: set[str] = set()
        self.files = self.answered = 0

    def look(self) -> None:
        """Read all new files, and ask each new model for a text."""
        for name in list_names(self._prefixes):
            path = path_of(self._prefixes, name)
            signature = signature_of(path)
            if signature is None or self._read.get(name) == signature:
                continue
            try:
                prefix = read_artifact(path)
            except (CheckpointError, OSError) as error:
                if signature_of(path) == signature:
                    self.faults.append(f"{name} is served and cannot be read: {error}")
                continue
            if not all(bool(torch.isfinite(tensor).all()) for tensor in prefix.tensors()):
                self.faults.append(f"{name} is served and not finite")
            if job_origin(prefix.header) is None:
                self.faults.append(f"{name} is served and says no job")
            self._read[name] = signature
            self.files += 1
        self._ask()

    def _ask(self) -> None:
        listed = self._http.once("GET", "/v1/models")
        if listed is None or listed[0] != 200:
            return
        for name in {model["id"] for model in listed[1]["data"]} - self._asked:
            body = {"model": name, "prompt": "n : a", "max_tokens": 2, "temperature": 0}
            answer = self._http.once("POST", "/v1/completions", json=body)
            if answer is None or answer[0] in (429, 503):
                continue
            # A cancelled job's is gone at once.
            if answer[0] == 404 and signature_of(path_of(self._prefixes, name)) is None:
                continue
            if answer[0] != 200:
                self.faults.append(f"{name} is listed, and answers {answer}")
            self._asked.add(name)
            self.answered += 1
