"""Kill servers and workers at any moment while jobs train, and see that nothing is lost.

The server and its workers are real (`prefixtune serve`, `prefixtune worker`), over a tiny random model. Jobs are asked
for over HTTP while processes are killed; some are paused and resumed, some cancelled. Besides, the database is locked
(SQLite) or stopped (Postgres) for a while.

What must hold: each job ends once; what succeeded is served, whole and as the same job gives without a kill; nothing is
served of what was cancelled; no half result is seen at any moment; no leftovers.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from prefixtune.prefix.folder import path_of
from prefixtune.prefix.header import job_origin
from prefixtune.prefix.prefix import read_artifact
from stress.service import Http, Service
from stress.watch import JobWatcher, ServedWatcher

ENDED = ("succeeded", "failed", "cancelled")
_LETTERS = "abcdefghijklmnop"
_END_SECONDS, _TIDY_SECONDS = 300.0, 30.0
"""Time for the jobs that are left after the last kill, and for workers to tidy up."""


@dataclass(frozen=True)
class Plan:
    """What happens.

    Attributes:
        jobs: How many are asked for.
        kills: How many processes are killed.
        workers: How many train at once.
        steps: Fewest and most steps of a job.
        targets: What is killed, each as likely; `both` are a server and its worker.
        outage_seconds: How long the database is away; 0: never.
        seed: Of everything that is by chance.
    """

    jobs: int = 40
    kills: int = 200
    workers: int = 1
    steps: tuple[int, int] = (100, 300)
    targets: tuple[str, ...] = ("server", "worker", "worker", "both")
    outage_seconds: float = 60.0
    seed: int = 0

    def requests(self):
        """The bodies of requests for jobs, without a file."""
        chance = random.Random(self.seed)
        usual = {"prefix_length": 4, "init_text": "ab", "preset": "none"}
        return [
            {
                "seed": index,
                "hyperparameters": {"batch_size": 4},
                "prefixtune": {"name": f"result-{index:02}", "max_steps": chance.randint(*self.steps), **usual},
            }
            for index in range(self.jobs)
        ]

    @staticmethod
    def data(index):
        """The file of a job."""
        letters = random.Random(index).sample(_LETTERS, 8)
        rows = [{"prompt": f"n : {letter}", "completion": f" {letter}{letter} it is."} for letter in letters]
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@dataclass
class Outcome:
    """What happened.

    Attributes:
        kills: Kind of process -> how many were killed.
        jobs: The jobs at the end, in the order of requests.
        events: Other things that befell them.
        faults: What must not be.
    """

    kills: Counter[str] = field(default_factory=Counter)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


class Kills:
    """One run of a plan; `folder` must be empty."""

    def __init__(self, plan, model, folder, postgres=None):
        self.plan, self.folder, self.postgres, self.model = plan, folder, postgres, model
        self.chance, self.outcome = random.Random(plan.seed + 1), Outcome()
        self.service = Service(model, folder, postgres.url if postgres else "", plan.workers)
        self.http = Http(self.service.url)
        self.jobs = JobWatcher(Http(self.service.url))
        self.served = ServedWatcher(self.service.prefixes, Http(self.service.url))
        self.ids = []
        self.cancelled = set()

    def run(self):
        """Do all of it."""
        try:
            self.http("GET", "/readyz")
            self.jobs.start()
            self.served.start()
            self._disturb()
            self._wait_for_the_end()
            self._look_at_the_end()
        finally:
            self.service.close()
            for closing in (self.jobs, self.served, self.http):
                closing.close()
        return self.outcome

    # --- what befalls them --------------------------------------------------------------------------------------------

    def _disturb(self):
        plan, kills = self.plan, 0
        outages = [0.3, 0.7] if plan.outage_seconds else []
        while kills < plan.kills or len(self.ids) < plan.jobs:
            # Asked for in the course of the kills, so that there is always one to disturb.
            wanted = plan.jobs if not plan.kills else min(plan.jobs, 1 + int(plan.jobs * kills / plan.kills))
            while len(self.ids) < wanted:
                self._ask_for_job()
            if kills < plan.kills:
                # Half of the time so long that a job trains again, so that not only starts are disturbed.
                time.sleep(self.chance.uniform(0.0, 2.0) + self.chance.choice((0.0, 6.0)))
                kills += self._kill()
            if plan.kills and self.chance.random() < 0.3:
                self._meddle()
            if outages and kills >= outages[0] * plan.kills:
                outages.pop(0)
                self._take_database_away()

    def _kill(self):
        """Kill something; returns how many processes."""
        kind = self.chance.choice(self.plan.targets)
        index = self.chance.randrange(self.plan.workers)
        killed = 0
        if kind == "worker" and index:
            self.service.kill_worker(index)
            killed = 1
        elif kind != "server":
            killed = self.service.kill_child()
        if kind != "worker":
            self.service.kill_server()
            self.outcome.kills["server"] += 1
        self.outcome.kills["worker"] += killed
        return killed + (kind != "worker")

    def _meddle(self):
        """Pause, resume or cancel."""
        states = {job_id: job["status"] for job_id, job in list(self.jobs.jobs.items())}
        paused = [job_id for job_id, status in states.items() if status == "paused"]
        going = [job_id for job_id, status in states.items() if status in ("queued", "running")]
        action = self.chance.choice(["pause", "pause", "resume", "resume", "resume", "cancel"])
        some = paused if action == "resume" else going
        if action == "cancel" and len(self.cancelled) >= self.plan.jobs // 6:
            return
        for job_id in some if action == "resume" else self.chance.sample(some, min(1, len(some))):
            status, body = self.http("POST", f"/v1/fine_tuning/jobs/{job_id}/{action}")
            self.outcome.events[action] += 1
            if status not in (200, 400):
                self.outcome.faults.append(f"{action} {job_id}: {status} {body}")
            if action == "cancel" and status == 200:
                self.cancelled.add(job_id)

    def _ask_for_job(self):
        index = len(self.ids)
        upload = {"file": (f"data-{index}.jsonl", self.plan.data(index))}
        status, file = self.http("POST", "/v1/files", files=upload, data={"purpose": "fine-tune"})
        assert status == 200, f"a file was refused: {status} {file}"
        body = {"model": self.model.name, "training_file": file["id"], **self.plan.requests()[index]}
        # Sent again after a kill, it is the same job.
        header = {"Idempotency-Key": f"job-{index}"}
        status, job = self.http("POST", "/v1/fine_tuning/jobs", json=body, headers=header)
        assert status == 200, f"a job was refused: {status} {job}"
        self.ids.append(job["id"])

    def _take_database_away(self):
        self.outcome.events["database_away"] += 1
        if self.postgres is not None:
            self.postgres.stop()
            time.sleep(self.plan.outage_seconds)
            self.postgres.start()
        else:
            self.service.lock_database(self.plan.outage_seconds).join()

    # --- the end ------------------------------------------------------------------------------------------------------

    def _wait_for_the_end(self):
        end = time.monotonic() + _END_SECONDS
        left = []
        while time.monotonic() < end:
            states = {job_id: self.http("GET", f"/v1/fine_tuning/jobs/{job_id}")[1]["status"] for job_id in self.ids}
            for job_id in (job_id for job_id, status in states.items() if status == "paused"):
                self.http("POST", f"/v1/fine_tuning/jobs/{job_id}/resume")
            left = [f"{job_id} {status}" for job_id, status in states.items() if status not in ENDED]
            if not left:
                return
            time.sleep(0.5)
        self.outcome.faults.append(f"jobs do not end: {left}")

    def _look_at_the_end(self):
        outcome = self.outcome
        outcome.jobs = [self.http("GET", f"/v1/fine_tuning/jobs/{job_id}")[1] for job_id in self.ids]
        # Workers remove within seconds what a kill left of a cancelled job, and the inputs of all.
        end = time.monotonic() + _TIDY_SECONDS
        while time.monotonic() < end and any((*self._unwanted(), *self.service.data.glob("jobs/*/inputs"))):
            time.sleep(0.5)
        outcome.faults += self._unwanted()
        time.sleep(1.0)
        self.jobs.close()
        self.served.close()
        for job, request in zip(outcome.jobs, self.plan.requests(), strict=True):
            outcome.faults += self._wrong(job, request["prefixtune"])
        for looking in (self.jobs, self.served, self.http, self.jobs.http, self.served.http):
            outcome.faults += looking.faults
        codes = self.service.stop()
        if any(codes):
            outcome.faults.append(f"exit codes {codes}")
        outcome.faults += [f"left over: {path}" for path in self._leftovers()]

    def _unwanted(self):
        """Served files of jobs that did not succeed."""
        ended = {job["id"]: job["status"] for job in self.outcome.jobs}
        for path in sorted(self.service.prefixes.glob("*.safetensors")):
            try:
                origin = job_origin(read_artifact(path).header)
            except FileNotFoundError:
                continue
            if origin is None or ended.get(origin.id) != "succeeded":
                yield f"{path.name} is served, and its job is {ended.get(origin.id) if origin else None}"

    def _wrong(self, job, asked):
        name, status = asked["name"], job["status"]
        if (job["id"] in self.cancelled) != (status == "cancelled"):
            yield f"{name}: cancelled {job['id'] in self.cancelled}, and {status}"
        if status == "failed":
            yield f"{name} failed: {job['error']}"
        if status != "succeeded":
            return
        path = path_of(self.service.prefixes, name)
        origin = job_origin(read_artifact(path).header) if path.exists() else None
        if origin is None or origin.id != job["id"]:
            yield f"{name} succeeded, and is not served"
        code, content = self.http("GET", f"/v1/files/{job['result_files'][0]}/content")
        if code != 200 or content.count(b"\n") != 1 + asked["max_steps"]:
            yield f"{name}: the metrics of {asked['max_steps']} steps are {code} {content[:100]!r}"

    def _leftovers(self):
        for root in (self.service.prefixes, self.service.data):
            for path in sorted(root.rglob("*")):
                # The locks of jobs stay, and nobody holds them.
                if path.name == ".lock" and path.parent.parent.name == "jobs":
                    continue
                if path.name.startswith(".") or path.suffix in (".lock", ".tmp"):
                    yield str(path.relative_to(self.folder))


def differences(outcome, plan, results, reference):
    """What succeeded and differs from what the same jobs gave where nothing happened."""
    found = []
    for job, request in zip(outcome.jobs, plan.requests(), strict=True):
        name = request["prefixtune"]["name"]
        if job["status"] == "succeeded":
            ours, theirs = (read_artifact(path_of(folder, name)) for folder in (results, reference))
            if not ours.equal(theirs):
                found.append(f"{name} is not what it is without a kill")
    return found
