"""The supervisor of a server's worker goes on whatever the system refuses, and whatever the worker leaves behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from prefixtune.server import training_worker
from prefixtune.server.training_worker import TrainingWorker
from prefixtune.utils.supervise import RestartPauses

# Ends, while what it has started holds its output.
LEAVING = """
import os, subprocess, sys
left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(os.environ["STARTS"], "a").write(f"{left.pid}\\n")
print("said", flush=True)
sys.exit(3)
"""
# Lives as long as its parent.
LIVING = """
import os, sys
open(os.environ["STARTS"], "a").write(f"{os.getpid()}\\n")
sys.stdin.read()
"""


class Supervised:
    """A supervisor of stub workers, and what it logged."""

    def __init__(self, folder: Path) -> None:
        self.starts, self.logged = folder / "starts", list[tuple[str, dict[str, Any]]]()
        self.workers: list[TrainingWorker] = []

    def start(self, code: str) -> TrainingWorker:
        made = TrainingWorker([sys.executable, "-c", code], {"STARTS": str(self.starts)}, lambda: True)
        self.workers.append(made)
        made.start()
        return made

    def pids(self) -> list[int]:
        return [int(line) for line in self.starts.read_text().splitlines()] if self.starts.exists() else []

    def of(self, event: str) -> list[dict[str, Any]]:
        return [fields for name, fields in self.logged if name == event]


@pytest.fixture
def supervised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Supervised]:
    made = Supervised(tmp_path)
    monkeypatch.setattr(training_worker, "log", lambda event, **fields: made.logged.append((event, fields)))
    monkeypatch.setattr(RestartPauses, "SHORTEST", 0.02)
    yield made
    for pid in made.pids():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    for worker in made.workers:
        worker.stop(10.0)


def until(good: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def test_a_worker_whose_child_holds_its_output_is_started_again(supervised: Supervised) -> None:
    worker = supervised.start(LEAVING)
    until(lambda: len(supervised.pids()) >= 2)
    died = supervised.of("worker_died")[0]
    assert (died["code"], died["reason"]) == (3, "said")
    began = time.monotonic()
    worker.stop(10.0)
    assert time.monotonic() - began < 10.0
    assert not supervised.of("worker_killed")


def test_a_thread_that_does_not_start_ends_no_supervision(
    supervised: Supervised, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, failed = threading.Thread.start, list[str]()

    def fail_once(thread: threading.Thread) -> None:
        if "_read_output" in thread.name and not failed:
            failed.append(thread.name)
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", fail_once)
    worker = supervised.start(LIVING)
    until(lambda: supervised.of("worker_started"))
    assert failed
    assert [died["reason"] for died in supervised.of("worker_died")] == ["can't start new thread"]
    until(supervised.pids)
    worker.stop(10.0)
    assert len(supervised.of("worker_ended")) == 1
