"""A job that trains: its folder is let go whatever happens."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from prefixtune.jobs.active import ActiveJob, Claim, hold_folder
from prefixtune.jobs.events import JobEvents
from prefixtune.jobs.folder import DataFolder
from prefixtune.training.folder import EVENTS_FILE
from prefixtune.training.runs import Run
from training_jobs import make_job


def test_a_run_that_cannot_be_closed_lets_its_folder_go(tmp_path: Path) -> None:
    data = DataFolder(tmp_path)
    job = make_job(data)
    folder = data.job(job.id)
    folder.run.mkdir()
    (folder.run / EVENTS_FILE).touch()
    loop: Any = SimpleNamespace(state=SimpleNamespace(step=0, total_steps=6))
    tracking: Any = None

    def fail() -> None:
        raise OSError(5, "a bad block")

    with contextlib.ExitStack() as closing, contextlib.ExitStack() as holding:
        assert holding.enter_context(hold_folder(folder))
        closing.callback(fail)
        active = ActiveJob(
            Claim(job, "token"),
            folder,
            Run(loop, [], print, tracking),
            JobEvents(folder),
            closing=closing.pop_all(),
            holding=holding.pop_all(),
        )
    with hold_folder(folder) as is_free:
        assert not is_free
    with pytest.raises(OSError, match="a bad block"):
        active.release()
    with hold_folder(folder) as is_free:
        assert is_free
