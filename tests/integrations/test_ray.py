"""Studies on a cluster of Ray's: shared among its workers, killed and gone on with, and a cluster that is not there."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import ray  # noqa: F401  A program of its own uses it; without it these tests are to fail at once.

from command_line import events_of, run, run_apart, start, until
from small_study import cells, scores_of, store_model, write_config


@pytest.fixture(scope="module")
def flags(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("ray")
    config = write_config(folder / "study.toml", store_model(folder / "model"))
    return ("study", "methods", "--config", str(config), "--methods", "zero-shot,prefix,full")


def test_workers_of_ray_share_a_study_that_is_killed_and_goes_on(flags: tuple[str, ...], tmp_path: Path) -> None:
    folder, alone = tmp_path / "study", tmp_path / "alone"
    run(*flags, "--seeds", "2", "--output", str(alone))
    spread = (*flags, "--output", str(folder), "--seeds", "2", "--ray", "2", "--json")
    # Ray makes its workers nice to others, and would wait for all other tests.
    eager = {"environment": {"RAY_worker_niceness": "0"}}
    with start(*spread, **eager) as process:
        until(process, lambda event: event["event"] == "cell" and event["status"] == "done")
        process.kill()
    out = run_apart(*spread, **eager)[0]
    events = events_of(out)
    assert len(events[-1]["done"]) == 5
    assert {event["worker"] for event in events if "worker" in event} == {0, 1}
    begun = Counter(cells(events, "begun"))
    assert set(begun.values()) == {1}
    assert len(begun) <= 4, "what was done before is not done again"
    assert scores_of(folder) == scores_of(alone)
    # Nothing is left to do now.
    left = run(*flags, "--output", str(folder), "--seeds", "2", "--json")[0]
    assert events_of(left)[-1]["done"] == events[-1]["done"]


def test_a_cluster_that_is_not_there(flags: tuple[str, ...], tmp_path: Path) -> None:
    error = run_apart(*flags, "--output", str(tmp_path / "s"), "--ray", "2", "--ray-address", "127.0.0.1:1", code=2)[1]
    assert "cannot start or reach the cluster '127.0.0.1:1'" in error
    assert "hint: " in error
