"""A run that reports to a tracker: what it reports, and that no tracker ends it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from prefixtune.errors import ConfigError
from prefixtune.training import trackers
from prefixtune.training.trackers import Tracker

Rows = list[tuple[int, dict[str, float]]]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> dict[str, Rows]:
    """What each tracker is told, by its name; every name stands for a fake one."""
    told: dict[str, Rows] = {}

    def start(name: str) -> Callable[[Any], Tracker]:
        def started(loop: Any) -> Tracker:
            own = told.setdefault(name, [])

            def log(values: Mapping[str, float], step: int) -> None:
                own.append((step, dict(values)))
                if name == "wandb" and step == 2:
                    raise OSError("the disk is full")

            return Tracker(log, lambda failed: own.append((-1, {"failed": float(failed)})))

        return started

    for name in trackers._STARTS:
        monkeypatch.setitem(trackers._STARTS, name, start(name))
    return told


def test_one_that_fails_is_left_out_with_a_warning(rows: dict[str, Rows], train: Callable[..., Any]):
    with pytest.warns(RuntimeWarning, match="wandb.*the disk is full"):
        result = train(4, report_to=("wandb", "trackio"))
    assert result.steps == 4
    assert [step for step, _ in rows["wandb"]] == [1, 2]
    assert len(rows["trackio"]) == 5


def test_one_that_does_not_start_refuses_the_run(
    rows: dict[str, Rows], train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def fail(loop: Any) -> Tracker:
        raise OSError("no network")

    monkeypatch.setitem(trackers._STARTS, "wandb", fail)
    with pytest.raises(ConfigError, match="no network"):
        train(2, report_to=("trackio", "wandb"))
    assert rows["trackio"] == [(-1, {"failed": 1.0})]
    assert not (tmp_path / "run" / "state.safetensors").exists()
