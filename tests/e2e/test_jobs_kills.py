"""A few kills of a server and its worker while jobs train: nothing is lost, and nothing half-made is served.

`make jobs-kills` does the same with hundreds, two databases, full disks and clocks that jump.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from bench.jobs.kills import Plan, run
from live_server import make_model


def test_jobs_survive_kills_of_server_and_worker(tmp_path: Path) -> None:
    model = make_model(tmp_path / "tiny-chat")
    plan = Plan(jobs=3, kills=3, steps=(40, 60), targets=("worker", "worker", "both"), outage_seconds=0.0)
    outcome = run(plan, model, tmp_path / "service", print)
    print(json.dumps(outcome.report()))
    assert outcome.faults == []
    assert sum(outcome.kills.values()) >= plan.kills
    assert Counter(state.status for state in outcome.states).keys() <= {"succeeded", "cancelled"}
