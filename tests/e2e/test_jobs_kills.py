"""A few kills of a server and its worker while jobs train; `make stress` does the same with many, and Postgres."""

from __future__ import annotations

from pathlib import Path

from live_server import make_model
from stress.kills import Kills, Plan


def test_jobs_survive_kills_of_server_and_worker(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny-chat")
    plan = Plan(jobs=3, kills=3, steps=(40, 60), targets=("worker", "worker", "both"), outage_seconds=0.0)
    outcome = Kills(plan, model, tmp_path / "service").run()
    assert outcome.faults == []
    assert sum(outcome.kills.values()) >= plan.kills
    assert {job["status"] for job in outcome.jobs} <= {"succeeded", "cancelled"}
