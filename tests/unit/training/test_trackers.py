"""A run that reports to a tracker: what it reports, and that no tracker ends it."""

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training import trackers
from prefixtune.training.trackers import Tracker


@pytest.fixture
def rows(monkeypatch):
    """What each tracker is told, by its name; every name stands for a fake one."""
    told = {}

    def start(name):
        def started(loop):
            own = told.setdefault(name, [])

            def log(values, step):
                own.append((step, dict(values)))
                if name == "wandb" and step == 2:
                    raise OSError("the disk is full")

            return Tracker(log, lambda failed: own.append((-1, {"failed": float(failed)})))

        return started

    monkeypatch.setattr("prefixtune.training.prepare.check_installed", lambda names: None)
    for name in trackers._STARTS:
        monkeypatch.setitem(trackers._STARTS, name, start(name))
    return told


def test_one_that_fails_is_left_out_with_a_warning(rows, train):
    with pytest.warns(RuntimeWarning, match="wandb.*the disk is full"):
        result = train(4, report_to=("wandb", "trackio"))
    assert result.steps == 4
    assert [step for step, _ in rows["wandb"]] == [1, 2]
    assert len(rows["trackio"]) == 5


def test_one_that_does_not_start_refuses_the_run(rows, train, monkeypatch, tmp_path):
    def fail(loop):
        raise OSError("no network")

    monkeypatch.setitem(trackers._STARTS, "wandb", fail)
    with pytest.raises(ConfigError, match="no network"):
        train(2, report_to=("trackio", "wandb"))
    assert rows["trackio"] == [(-1, {"failed": 1.0})]
    assert not (tmp_path / "run" / "state.safetensors").exists()
