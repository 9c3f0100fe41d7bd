"""Looks at jobs and at what is served all the time, and notes what must never be seen."""

import threading

import torch

from prefixtune.errors import CheckpointError
from prefixtune.prefix.folder import list_names, path_of, signature_of
from prefixtune.prefix.header import job_origin
from prefixtune.prefix.prefix import read_artifact


class _Watcher:
    """Looks again and again in a thread of its own, until it is closed; `faults`: what must never be seen."""

    def __init__(self, http, seconds):
        self.http, self.faults, self._seconds = http, list[str](), seconds
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self):
        """Begin."""
        self._thread.start()

    def close(self):
        """Look a last time, and end."""
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(120)

    def _watch(self):
        while True:
            is_last = self._stopped.is_set()
            try:
                self.look()
            except Exception as error:
                self.faults.append(f"{type(self).__name__}: {error!r}")
            if is_last:
                self.http.close()
                return
            self._stopped.wait(self._seconds)

    def look(self):
        """Look once."""
        raise NotImplementedError


class JobWatcher(_Watcher):
    """Where each job stands: one that has ended stays as it ended, and none is gone.

    Attributes:
        jobs: Job id -> as it stood last.
    """

    def __init__(self, http):
        super().__init__(http, 0.3)
        self.jobs = {}

    def look(self):
        """Compare each job with how it stood before."""
        answer = self.http.once("GET", "/v1/fine_tuning/jobs?limit=100")
        if answer is None or answer[0] != 200:
            return
        found = {job["id"]: job for job in answer[1]["data"]}
        for job_id, job in found.items():
            before = self.jobs.get(job_id)
            ended = before is not None and before["status"] in ("succeeded", "failed", "cancelled")
            if ended and (before["status"], before["finished_at"]) != (job["status"], job["finished_at"]):
                self.faults.append(f"{job_id} had ended as {before['status']}, and is {job['status']} again")
        self.faults += [f"{job_id} is gone" for job_id in self.jobs.keys() - found.keys()]
        self.jobs = found


class ServedWatcher(_Watcher):
    """Every file in the folder of prefixes, and every listed model: whole at any moment."""

    def __init__(self, prefixes, http):
        super().__init__(http, 0.1)
        self._prefixes = prefixes
        self._read = {}
        self._asked = set()

    def look(self):
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
        listed = self.http.once("GET", "/v1/models")
        if listed is None or listed[0] != 200:
            return
        for name in {model["id"] for model in listed[1]["data"]} - self._asked:
            body = {"model": name, "prompt": "n : a", "max_tokens": 2, "temperature": 0}
            answer = self.http.once("POST", "/v1/completions", json=body)
            if answer is None or answer[0] in (429, 503):
                continue
            # A cancelled job's is gone at once.
            if answer[0] == 404 and signature_of(path_of(self._prefixes, name)) is None:
                continue
            if answer[0] != 200:
                self.faults.append(f"{name} is listed, and answers {answer}")
            self._asked.add(name)
