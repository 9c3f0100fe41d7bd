"""The worker of a server: started on demand, started again when it dies, and gone with its parent."""

import os
import sys
import threading
import time

import pytest

from child_process import is_running, kill, start_child
from prefixtune.cli.commands import serve as worker_command
from prefixtune.cli.main import main
from prefixtune.server import training_worker
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training import Training
from prefixtune.server.training_worker import TrainingWorker, start_worker

# A worker that notes its start, and lives as long as its parent.
LIVING = """
import os, sys
open(os.environ["STARTS"], "a").write(f"{os.getpid()}\\n")
sys.stdin.read()
"""


class Supervised:
    """A supervisor of stub workers, and what it logged."""

    def __init__(self, folder):
        self.starts, self.jobs = folder / "starts", threading.Event()
        self.logged = []
        self.workers = []

    def start(self, code, has_jobs=None, **options):
        made = TrainingWorker(
            [sys.executable, "-c", code], {"STARTS": str(self.starts)}, has_jobs or self.jobs.is_set, **options
        )
        self.workers.append(made)
        made.start()
        return made

    def pids(self):
        return [int(line) for line in self.starts.read_text().splitlines()] if self.starts.exists() else []

    def of(self, event):
        return [fields for name, fields in self.logged if name == event]


@pytest.fixture
def supervised(tmp_path, monkeypatch):
    made = Supervised(tmp_path)
    monkeypatch.setattr(training_worker, "log", lambda event, **fields: made.logged.append((event, fields)))
    monkeypatch.setattr(training_worker, "_SHORTEST", 0.02)
    yield made
    for worker in made.workers:
        worker.stop(0.0)


def until(good, seconds=10):
    end = time.monotonic() + seconds
    while not good():
        assert time.monotonic() < end, "the condition did not come true in time"
        time.sleep(0.01)


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_worker_is_started_when_a_job_waits_and_stops_with_the_server(supervised):
    worker = supervised.start(LIVING)
    time.sleep(0.2)
    assert supervised.pids() == []
    supervised.jobs.set()
    worker.wake()
    until(supervised.pids)
    # One that runs already takes the next job as well.
    worker.wake()
    time.sleep(0.1)
    (pid,) = supervised.pids()
    worker.stop(10.0)
    assert not exists(pid)
    assert [event for event, _ in supervised.logged] == ["worker_started", "worker_ended"]


def test_a_worker_that_is_killed_is_started_again(supervised):
    supervised.jobs.set()
    supervised.start(LIVING)
    for count in (1, 2, 3):
        until(lambda count=count: len(supervised.pids()) == count)
        os.kill(supervised.pids()[-1], 9)
    until(lambda: len(supervised.pids()) == 4)
    assert [fields["code"] for fields in supervised.of("worker_died")] == [-9, -9, -9]


def test_a_database_that_is_away_is_looked_at_again(supervised):
    looks = []

    def has_jobs():
        looks.append(0)
        if len(looks) < 4:
            raise RuntimeError("away")
        return True

    supervised.start(LIVING, has_jobs)
    until(supervised.pids)
    assert supervised.of("worker_failed")[0] == {"level": 30, "reason": "away"}


def test_one_that_does_not_end_is_killed_after_the_limit(supervised):
    supervised.jobs.set()
    deaf = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + LIVING + "import time; time.sleep(60)"
    worker = supervised.start(deaf)
    until(supervised.pids)
    (pid,), began = supervised.pids(), time.monotonic()
    worker.stop(0.2)
    assert time.monotonic() - began < 5
    assert not exists(pid)
    assert supervised.of("worker_killed")


def test_a_password_is_in_the_environment_and_not_in_the_command(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(training_worker.TrainingWorker, "start", lambda self: made.append(self))
    url = "postgresql://me:secret@db/jobs"
    config = ServeConfig(
        database_url=url, data_folder=str(tmp_path), prefixes=str(tmp_path), train_threads=3, train_nice=7, cache_mib=77
    )
    training = Training(config)
    assert start_worker(ServeConfig(train_workers=0, database_url=url), training) is None
    assert start_worker(config, None) is None
    worker = start_worker(config, training)
    assert made == [worker]
    command, environment = worker.command, worker.environment
    assert "secret" not in " ".join(command)
    assert environment["PREFIXTUNE_WORKER_DATABASE_URL"] == url
    # As the worker itself reads them.
    seen = []
    monkeypatch.setattr(worker_command, "_run", lambda config, stop: seen.append(config) or 0)
    monkeypatch.setattr(worker_command, "_exit_now", lambda code: code)
    monkeypatch.setattr(worker_command, "_follow_parent", lambda stop: None)
    monkeypatch.setenv("PREFIXTUNE_WORKER_DATABASE_URL", environment["PREFIXTUNE_WORKER_DATABASE_URL"])
    main(list(command[command.index("worker") :]))
    (read,) = seen
    for name in ("backbone", "dtype", "device", "quantize", "database_url", "data_folder", "cache_mib"):
        assert getattr(read, name) == getattr(config, name)
    assert (read.threads, read.nice, read.idle_seconds) == (3, 7, config.train_idle_seconds)
    assert read.prefixes == str(tmp_path)


def test_it_notices_that_the_server_was_killed(supervised):
    server = start_child(
        "from prefixtune.server.training_worker import TrainingWorker\n"
        "worker = TrainingWorker([sys.executable, '-c', sys.argv[1]], {'STARTS': sys.argv[2]}, lambda: True)\n"
        "worker.start()\nprint('ready', flush=True)\ntime.sleep(60)",
        LIVING,
        supervised.starts,
    )
    try:
        until(supervised.pids)
    finally:
        kill(server)
    (pid,) = supervised.pids()
    until(lambda: not is_running(pid))
