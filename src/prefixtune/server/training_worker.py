"""The worker that a server starts for itself: a child process that trains while there are jobs.

It ends when its parent does, however that ends: its stdin is a pipe that nobody writes to. It ends as well when it has
had nothing to do for a while, and is started again on demand. Its log lines are the server's own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from prefixtune.jobs.config import WORKER_ENVIRONMENT
from prefixtune.server.logs import log
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training import Training
from prefixtune.utils.machine import num_cores

STOP_SECONDS = 15.0
"""Time for a worker to save and end, a little more than it takes itself."""
_LOOK_SECONDS = 60.0
"""Between looks for jobs that nobody told of: those of another server, which may have died with its worker."""
_POLL_SECONDS = 0.25
_SHORTEST, _LONGEST, _STEADY = 1.0, 60.0, 60.0
"""Pauses before a worker that died is started again double up to the longest; one that lived for so many seconds is
started again after the shortest."""


def start_worker(config: ServeConfig, training: Training | None) -> TrainingWorker | None:
    """Start the supervisor of this server's worker; None: it is to have none."""
    if training is None or not config.train_workers:
        return None
    threads = config.train_threads or max(1, num_cores() // 2)
    same = ("backbone", "backbone_id", "dtype", "quantize", "cache_mib", "log_level")
    options = {name: getattr(config, name) for name in same} | {
        # With vLLM, a GPU's memory is its own.
        "device": "cpu" if config.engine == "vllm" and config.device == "auto" else config.device,
        "data_folder": training.folder.root,
        "prefixes": Path(config.prefixes).absolute(),
        "idle_seconds": config.train_idle_seconds,
        "threads": threads,
        "nice": config.train_nice,
    }
    command = [sys.executable, "-P", "-m", "prefixtune", "worker", "--with-parent"]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    environment = {
        # Everybody on a machine sees commands, and this may hold a password.
        f"{WORKER_ENVIRONMENT}DATABASE_URL": training.database_url,
        "OMP_NUM_THREADS": str(threads),
        # Threads that wait by computing would take turns from the server.
        "OMP_WAIT_POLICY": "passive",
    }
    worker = TrainingWorker(command, environment, training.has_jobs)
    training.wake = worker.wake
    worker.start()
    return worker


class TrainingWorker:
    """Keeps a worker running while there are jobs. All methods but `stop` return at once.

    Args:
        command: Starts a worker. It ends with 0 after some time without jobs, and soon after its stdin is closed.
        environment: Variables of the worker besides this process's own.
        has_jobs: Whether jobs wait or run; called in a thread, it may block and raise any error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], has_jobs: Callable[[], bool]) -> None:
        self.command, self.environment, self._has_jobs = tuple(command), environment, has_jobs
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._supervise, name="prefixtune-training-worker", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Look for jobs now, and from time to time."""
        self._thread.start()

    def wake(self) -> None:
        """There is a job: look for it at once."""
        self._wake.set()

    def begin_stop(self) -> None:
        """Let the worker save and end; no other one is started."""
        self._stopping.set()
        self._wake.set()

    def stop(self, seconds: float) -> None:
        """Wait until the worker has ended; after `seconds` it is killed."""
        self.begin_stop()
        self._thread.join(seconds)
        if (process := self._process) is not None:
            log("worker_killed", level=logging.WARNING, worker=process.pid)
            process.kill()
            self._thread.join(10.0)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        pause = _SHORTEST
        while not self._stopping.is_set():
            self._wake.clear()
            began, has_died = time.monotonic(), True
            try:
                if not self._has_jobs():
                    self._wake.wait(_LOOK_SECONDS)
                    continue
                has_died = self._run()
            except Exception as error:
                # The database is away, or the system starts no process now. Without this thread, no worker would be.
                log("worker_failed", level=logging.WARNING, reason=getattr(error, "strerror", None) or str(error))
            # Even after a good end its job may still be there, or another one that was queued while it ended.
            pause = min(_LONGEST, 2 * pause) if has_died and time.monotonic() - began < _STEADY else _SHORTEST
            self._stopping.wait(pause)

    def _run(self) -> bool:
        """Run a worker to its end; returns whether it died."""
        # Of a session of its own: Ctrl-C in a terminal reaches the server alone, and the worker by it.
        process = self._process = subprocess.Popen(
            self.command, stdin=subprocess.PIPE, env={**os.environ, **self.environment}, start_new_session=True
        )
        log("worker_started", worker=process.pid)
        while process.poll() is None and not self._stopping.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
        # By a signal, a worker that got the same one with its whole group would take it for the second.
        assert process.stdin is not None
        process.stdin.close()
        code = process.wait()
        self._process = None
        has_died = code != 0 and not self._stopping.is_set()
        level = logging.ERROR if has_died else logging.INFO
        log("worker_died" if has_died else "worker_ended", level=level, worker=process.pid, code=code)
        return has_died
