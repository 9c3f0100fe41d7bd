"""Kill servers and workers while jobs train, and put a mixed load on a server: `make stress`.

STRESS_KILLS, STRESS_JOBS and STRESS_SECONDS (of the load, and of the database's absence) set how much.
"""

import os

import pytest

from live_server import make_model
from stress.kills import Kills, Plan, differences
from stress.load import put_load
from stress.service import Postgres, has_postgres

KILLS, JOBS = (int(os.environ.get(f"STRESS_{name}", usual)) for name, usual in (("KILLS", "60"), ("JOBS", "12")))
SECONDS = float(os.environ.get("STRESS_SECONDS", "30"))


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_jobs_survive_kills(database, tmp_path):
    if database == "postgres" and not has_postgres():
        pytest.skip("there is no Postgres; on Debian: apt install postgresql")
    model = make_model(tmp_path / "tiny-chat")
    plan = Plan(jobs=JOBS, kills=KILLS, workers=3 if database == "postgres" else 1, outage_seconds=SECONDS)
    quiet = Kills(Plan(jobs=JOBS, kills=0, outage_seconds=0.0), model, tmp_path / "quiet").run()
    assert quiet.faults == []
    postgres = Postgres() if database == "postgres" else None
    try:
        outcome = Kills(plan, model, tmp_path / "killed", postgres).run()
    finally:
        if postgres is not None:
            postgres.close()
    print(outcome.kills, outcome.events, [job["status"] for job in outcome.jobs])
    assert outcome.faults == []
    assert sum(outcome.kills.values()) >= plan.kills
    assert differences(outcome, plan, tmp_path / "killed" / "prefixes", tmp_path / "quiet" / "prefixes") == []


def test_a_mixed_load(tmp_path):
    tally = put_load(tmp_path, seconds=SECONDS, prefixes=40, connections=16)
    assert tally.faults == []
    assert tally.left > 0
    shares = [tally.tokens[name] for name in ("heavy", "light", "other")]
    assert min(shares) > 0.5 * max(shares), tally
