"""Kill servers and workers at any moment while jobs train, and see that nothing is lost.

    python -m bench.jobs.kills                          # SQLite, 40 jobs, 200 kills: an hour on two cores
    python -m bench.jobs.kills --database postgres      # a Postgres of its own, and three workers
    python -m bench.jobs.kills --capacity 1             # each job alone: results equal to the bit
    python -m bench.jobs.kills --jobs 6 --kills 10      # only to see that it works

The server and its workers are real (`prefixtune serve`, `prefixtune worker`), over a tiny random model. Jobs are asked
for over HTTP while processes are killed; some are paused and resumed, some cancelled. Besides, the disk is full for a
while, the database is locked (SQLite) or stopped (Postgres), and the clock jumps to and fro.

What must hold: each job ends once; what succeeded is served, whole and as the same job gives without a kill; nothing is
served of what was cancelled; no half result is seen at any moment; no leftovers.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.jobs.service import Disturbance, Http, Postgres, Service
from bench.jobs.watch import JobWatcher, ServedWatcher
from bench.machine import BackgroundLoad
from bench.results import FOLDER, Log, write_results
from prefixtune.jobs.folder import DataFolder
from prefixtune.jobs.job import ENDED, UNFINISHED, JobState
from prefixtune.prefix.artifact import read_artifact
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.header import job_origin

__all__ = ["Outcome", "Plan", "run"]


_LETTERS = "abcdefghijklmnop"
_END_SECONDS = 300.0
"""Time for the jobs that are left after the last kill."""
_TIDY_SECONDS = 30.0
_TRAINING_SECONDS = 60.0
"""Longest wait for a job that trains again after a kill."""
_CLOSE = 1e-3
"""Of jobs that trained in company, the largest difference from one that trained alone: sums are rounded otherwise."""


@dataclass(frozen=True)
class Plan:
    """What happens.

    Attributes:
        jobs: How many are asked for.
        kills: How many processes are killed.
        workers: How many train at once.
        capacity: Most jobs that share a pass.
        steps: Fewest and most steps of a job.
        targets: What is killed, each as likely; `both` are a server and its worker.
        outage_seconds: How long the database is away, and the disk full for a third of that; 0: never.
        seed: Of everything that is by chance.
    """

    jobs: int = 40
    kills: int = 200
    workers: int = 1
    capacity: int = 8
    steps: tuple[int, int] = (100, 300)
    targets: tuple[str, ...] = ("server", "worker", "worker", "both")
    outage_seconds: float = 60.0
    seed: int = 0

    def requests(self) -> list[dict[str, Any]]:
        """The bodies of requests for jobs, without a file."""
        chance = random.Random(self.seed)
        return [
            {
                "seed": index,
                "hyperparameters": {"batch_size": 4},
                "prefixtune": {
                    "name": f"result-{index:02}",
                    "max_steps": chance.randint(*self.steps),
                    "prefix_length": 4,
                    "init_text": "ab",
                    "preset": "none",
                },
            }
            for index in range(self.jobs)
        ]

    @staticmethod
    def data(index: int) -> bytes:
        """The file of a job."""
        letters = random.Random(index).sample(_LETTERS, 8)
        rows = [{"prompt": f"n : {letter}", "completion": f" {letter}{letter} it is."} for letter in letters]
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()


@dataclass
class Outcome:
    """What happened.

    Attributes:
        kills: Kind of process -> how many were killed.
        states: As the jobs stood at the end, in the order of requests.
        changes: Statuses of each job in turn.
        events: Other things that befell it.
        faults: What must not be.
        seconds: It took.
        compared: Results that were compared with those of jobs that nobody disturbed.
        equal: Those that were the same to the bit.
        figures: Further figures.
    """

    kills: Counter[str] = field(default_factory=Counter)
    states: list[JobState] = field(default_factory=list)
    changes: list[list[str]] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    compared: int = 0
    equal: int = 0
    figures: dict[str, Any] = field(default_factory=dict)

    def report(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "kills": dict(self.kills),
            "jobs": dict(Counter(state.status for state in self.states)),
            "errors": dict(Counter(state.error.code for state in self.states if state.error)),
            "events": dict(self.events),
            "status_changes": sum(map(len, self.changes)),
            "compared": self.compared,
            "equal_to_the_bit": self.equal,
            "seconds": round(self.seconds, 1),
            **self.figures,
            "faults": self.faults,
        }


def run(plan: Plan, model: Path, folder: Path, log: Log, postgres: Postgres | None = None) -> Outcome:
    """Do all of it once; `folder` must be empty."""
    return _Run(plan, model, folder, log, postgres).run()


class _Run:
    def __init__(self, plan: Plan, model: Path, folder: Path, log: Log, postgres: Postgres | None) -> None:
        self.plan, self.folder, self.log, self.postgres, self.model = plan, folder, log, postgres, model
        self.chance, self.outcome = random.Random(plan.seed + 1), Outcome()
        environment = {"PREFIXTUNE_WORKER_CAPACITY": str(plan.capacity)}
        self.disturbance = None
        if plan.outage_seconds and Disturbance.is_possible():
            self.disturbance = Disturbance(folder, folder)
            environment |= self.disturbance.environment
        url = postgres.url if postgres else ""
        self.service = Service(model, folder, url, plan.workers, environment)
        self.data = DataFolder(self.service.data)
        self.http = Http(self.service.url)
        self.jobs = JobWatcher(url or self.data.database_url)
        self.watching = Http(self.service.url)
        self.served = ServedWatcher(self.service.prefixes, self.watching)
        self.ids: list[str] = []
        self.cancelled: set[str] = set()

    def run(self) -> Outcome:
        began = time.monotonic()
        try:
            self.http("GET", "/readyz")
            self.served.start()
            self._disturb()
            self._wait_for_the_end()
            self._look_at_the_end()
        finally:
            self.service.close()
            for closing in (self.jobs, self.served, self.http, self.watching):
                closing.close()
            self.outcome.seconds = time.monotonic() - began
        return self.outcome

    # --- what befalls them --------------------------------------------------------------------------------------------

    def _disturb(self) -> None:
        plan, kills = self.plan, 0
        outages = self._outages()
        last_job = time.monotonic()
        while kills < plan.kills or len(self.ids) < plan.jobs:
            # Asked for in the course of the kills, so that there is always one to disturb.
            wanted = plan.jobs if not plan.kills else min(plan.jobs, 1 + int(plan.jobs * kills / plan.kills))
            while len(self.ids) < wanted:
                self._ask_for_job()
                if len(self.ids) == 1:
                    self.jobs.start()
            if kills < plan.kills:
                kills += self._kill()
            if plan.kills and self.chance.random() < 0.3:
                self._meddle()
            for share, outage in list(outages.items()):
                if kills >= share * plan.kills:
                    del outages[share]
                    outage()
            if time.monotonic() - last_job > 15:
                last_job = time.monotonic()
                self.log(f"{kills} kills, {len(self.ids)} jobs: {dict(self._statuses())}")

    def _statuses(self) -> Counter[str]:
        return Counter(state.status for state in list(self.jobs.states.values()))

    def _kill(self) -> int:
        """Wait a moment, and kill something; returns how many processes."""
        self._wait_a_moment()
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

    def _wait_a_moment(self) -> None:
        """Half of the time as long as it takes until a job trains again, so that not only starts are disturbed."""
        began, end = time.time(), time.monotonic() + _TRAINING_SECONDS
        is_patient = self.chance.random() < 0.5
        while is_patient and self._is_any_to_train() and time.monotonic() < end and self._trained_last() < began:
            time.sleep(0.2)
        time.sleep(self.chance.uniform(0.0, 2.0))

    def _is_any_to_train(self) -> bool:
        return any(status in ("queued", "running") for status in self._statuses())

    def _trained_last(self) -> float:
        """When a job took its last step, in seconds since 1970; as files have it, whose clock does not jump."""
        found = [0.0]
        for path in self.data.jobs.glob("*/events.jsonl"):
            with contextlib.suppress(OSError):
                found.append(path.stat().st_mtime)
        return max(found)

    def _meddle(self) -> None:
        """Pause, resume or cancel."""
        states = {job_id: state.status for job_id, state in list(self.jobs.states.items())}
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

    def _ask_for_job(self) -> None:
        index = len(self.ids)
        request = self.plan.requests()[index]
        upload = {"file": (f"data-{index}.jsonl", self.plan.data(index))}
        status, file = self.http("POST", "/v1/files", files=upload, data={"purpose": "fine-tune"})
        if status != 200:
            raise SystemExit(f"error: a file was refused: {status} {file}")
        body = {"model": self.model.name, "training_file": file["id"], **request}
        # Sent again after a kill, it is the same job.
        header = {"Idempotency-Key": f"job-{index}"}
        status, job = self.http("POST", "/v1/fine_tuning/jobs", json=body, headers=header)
        if status != 200:
            raise SystemExit(f"error: a job was refused: {status} {job}")
        self.ids.append(job["id"])

    def _outages(self) -> dict[float, Callable[[], None]]:
        """Share of the kills after which -> what happens then."""
        if not self.plan.outage_seconds:
            return {}
        outages: dict[float, Callable[[], None]] = {0.3: self._database_away, 0.7: self._database_away}
        if self.disturbance is not None:
            outages |= {0.2: self._clock_jumps(3600), 0.5: self._full_disk, 0.6: self._clock_jumps(-86400)}
            outages |= {0.8: self._clock_jumps(0), 0.85: self._full_disk}
        return outages

    def _database_away(self) -> None:
        self.outcome.events["database_away"] += 1
        self.log("the database is away")
        if self.postgres is not None:
            self.postgres.stop()
            time.sleep(self.plan.outage_seconds)
            self.postgres.start()
        else:
            self.service.lock_database(self.plan.outage_seconds).join()

    def _full_disk(self) -> None:
        assert self.disturbance is not None
        self.outcome.events["full_disk"] += 1
        self.log("the disk is full")
        with self.disturbance.full_disk():
            time.sleep(self.plan.outage_seconds / 6)

    def _clock_jumps(self, seconds: int) -> Callable[[], None]:
        def jump() -> None:
            assert self.disturbance is not None
            self.outcome.events["clock_jump"] += 1
            self.log(f"the clock jumps to {seconds} seconds from the right time")
            self.disturbance.set_clock(seconds)

        return jump

    # --- the end ------------------------------------------------------------------------------------------------------

    def _wait_for_the_end(self) -> None:
        end = time.monotonic() + _END_SECONDS
        while time.monotonic() < end:
            for job_id in self.ids:
                state = self.jobs.states.get(job_id)
                if state is not None and state.status == "paused":
                    self.http("POST", f"/v1/fine_tuning/jobs/{job_id}/resume")
            if all((state := self.jobs.states.get(job_id)) and state.status in ENDED for job_id in self.ids):
                break
            time.sleep(0.5)
        left = self._statuses() & Counter(dict.fromkeys(UNFINISHED, 10_000))
        if left:
            self.outcome.faults.append(f"jobs do not end: {dict(left)}")

    def _look_at_the_end(self) -> None:
        outcome = self.outcome
        # Workers remove within seconds what a kill left of a cancelled job, and the inputs of all.
        end = time.monotonic() + _TIDY_SECONDS
        while time.monotonic() < end and any((*self._unwanted(), *self.data.jobs.glob("*/inputs"))):
            time.sleep(0.5)
        outcome.faults += self._unwanted()
        time.sleep(1.0)
        self.jobs.close()
        self.served.close()
        outcome.states = [self.jobs.states[job_id] for job_id in self.ids]
        outcome.changes = [list(self.jobs.changes[job_id]) for job_id in self.ids]
        outcome.faults += [*self.jobs.faults, *self.served.faults, *self.http.faults, *self.watching.faults]
        if len(self.jobs.states) != len(self.ids):
            outcome.faults.append(f"{len(self.ids)} jobs were asked for, and there are {len(self.jobs.states)}")
        for state in outcome.states:
            outcome.faults += self._wrong(state)
        outcome.figures = {"looks": self.jobs.looks, "files_read": self.served.files, "asked": self.served.answered}
        codes = self.service.stop()
        if any(codes):
            outcome.faults.append(f"exit codes {codes}")
        outcome.faults += [f"left over: {path}" for path in self._leftovers()]

    def _unwanted(self) -> Iterator[str]:
        """Served files of jobs that did not succeed."""
        for path in sorted(self.service.prefixes.glob("*.safetensors")):
            try:
                origin = job_origin(read_artifact(path).header)
            except FileNotFoundError:
                continue
            state = self.jobs.states.get(origin.id) if origin else None
            if state is None or state.status != "succeeded":
                yield f"{path.name} is served, and its job is {state.status if state else None}"

    def _wrong(self, state: JobState) -> Iterator[str]:
        job, name = state.job, state.job.name
        if (job.id in self.cancelled) != (state.status == "cancelled"):
            yield f"{name}: cancelled {job.id in self.cancelled}, and {state.status}"
        if state.status == "failed":
            yield f"{name} failed: {state.error}"
        events = self.http("GET", f"/v1/fine_tuning/jobs/{job.id}/events?limit=100")[1]["data"]
        told = sum(event["message"] == "The job has succeeded." for event in events)
        if told != (state.status == "succeeded"):
            yield f"{name} is {state.status}, and its events say {told} times that it succeeded"
        if state.status != "succeeded":
            return
        path = path_of(self.service.prefixes, name)
        origin = job_origin(read_artifact(path).header) if path.exists() else None
        if origin is None or origin.id != job.id:
            yield f"{name} succeeded, and is not served"
        if state.result is None or state.result.steps != job.config["max_steps"]:
            yield f"{name} succeeded after {state.result}"
            return
        status, content = self.http("GET", f"/v1/files/{state.result.result_files[0]}/content")
        if status != 200 or content.count(b"\n") != 1 + state.result.steps:
            yield f"{name}: the metrics of {state.result.steps} steps are {status} {content[:100]!r}"

    def _leftovers(self) -> Iterator[str]:
        for root in (self.service.prefixes, self.service.data):
            for path in sorted(root.rglob("*")):
                # A job's lock is a file of its folder, and nobody holds it.
                if path.name == ".lock" and path.parent.parent == self.data.jobs:
                    continue
                if path.name.startswith(".") or path.suffix in (".lock", ".tmp"):
                    yield str(path.relative_to(self.folder))


def compare(outcome: Outcome, results: Path, reference: Path, *, exact: bool) -> None:
    """Compare what succeeded with what the same jobs gave where nothing happened."""
    for state in outcome.states:
        if state.status != "succeeded":
            continue
        ours, theirs = (read_artifact(path_of(folder, state.job.name)) for folder in (results, reference))
        outcome.compared += 1
        pairs = list(zip(ours.tensors(), theirs.tensors(), strict=True))
        if all(torch.equal(mine, other) for mine, other in pairs):
            outcome.equal += 1
        elif exact:
            outcome.faults.append(f"{state.job.name} differs from what it is without a kill")
        elif (worst := max(float((mine - other).abs().max()) for mine, other in pairs)) > _CLOSE:
            outcome.faults.append(f"{state.job.name} differs by {worst:.2g} from what it is without a kill")


def main() -> None:
    """Run it as a program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--database", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--jobs", type=int, default=40)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--workers", type=int, help="default: 1, with Postgres 3")
    parser.add_argument("--capacity", type=int, default=8, help="jobs in one pass; 1: results equal to the bit")
    parser.add_argument("--outage", type=float, default=60.0, help="seconds; 0: only kills")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=FOLDER)
    given, load = parser.parse_args(), BackgroundLoad()
    from live_server import make_model

    def log(line: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    workers = given.workers or (3 if given.database == "postgres" else 1)
    plan = Plan(given.jobs, given.kills, workers, given.capacity, outage_seconds=given.outage, seed=given.seed)
    with tempfile.TemporaryDirectory(prefix="jobs-kills-") as name:
        work = Path(name)
        work.chmod(0o755)
        model = make_model(work / "tiny-chat")
        for folder in ("undisturbed", "killed"):
            (work / folder).mkdir()
        log("the same jobs without a kill ...")
        quiet = Plan(given.jobs, 0, 1, 1, outage_seconds=0.0, seed=given.seed)
        undisturbed = run(quiet, model, work / "undisturbed", log)
        if undisturbed.faults:
            raise SystemExit(f"error: without a kill: {undisturbed.faults}")
        log(f"took {undisturbed.seconds:.0f} s; now {plan}")
        postgres = Postgres(work) if given.database == "postgres" else None
        try:
            outcome = run(plan, model, work / "killed", log, postgres)
        finally:
            if postgres is not None:
                postgres.stop()
        results, reference = (work / folder / "prefixes" for folder in ("killed", "undisturbed"))
        compare(outcome, results, reference, exact=plan.capacity == 1)
    made = {"database": given.database, "workers": workers, "capacity": plan.capacity, **outcome.report()}
    print(json.dumps(made), flush=True)
    write_results(given.output / f"jobs-kills-{given.database}.json", load, made)
    if outcome.faults:
        raise SystemExit(f"error: {len(outcome.faults)} things that must not be")


if __name__ == "__main__":
    main()
