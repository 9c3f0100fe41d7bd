"""The worker that a server starts for itself: a child process that trains while there are jobs.

It ends when its parent does, however that ends: its stdin is a pipe that nobody writes to. It ends as well when it has
had nothing to do for a while, and is started again on demand.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.jobs.config import WORKER_ENVIRONMENT
from prefixtune.server.logs import log
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training import Training

__all__ = ["STOP_SECONDS", "TrainingWorker", "start_worker", "training_threads"]


STOP_SECONDS = 15.0
"""Time for a worker to save and end, a little more than it takes itself."""
_LOOK_SECONDS = 60.0
"""Between looks for jobs that nobody told of: those of another server, which may have died with its worker."""
_POLL_SECONDS = 0.25
_MAX_LINES, _MAX_LINE = 10, 1000
"""Of a worker's output, what is kept to say why it ended."""


def start_worker(config: ServeConfig, training: Training | None) -> TrainingWorker | None:
    """Start the supervisor of this server's worker; None: it is to have none."""
    if training is None or not config.train_workers:
        return None
    command = [sys.executable, "-P", "-m", "prefixtune", "worker", "--with-parent"]
    for name, value in {
        "backbone": config.backbone,
        "backbone_id": config.backbone_id,
        "dtype": config.dtype,
        # With vLLM, a GPU's memory is its own.
        "device": "cpu" if config.engine == "vllm" and config.device == "auto" else config.device,
        "quantize": config.quantize,
        "data_folder": training.folder.root,
        "prefixes": Path(config.prefixes).absolute(),
        "cache_mib": config.cache_mib,
        "keep_jobs": config.keep_jobs,
        "idle_seconds": config.train_idle_seconds,
        "threads": (threads := training_threads(config)),
        "nice": config.train_nice,
        "log_level": config.log_level,
    }.items():
        command.append(f"--{name.replace('_', '-')}={value}")
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


def training_threads(config: ServeConfig) -> int:
    """Threads of this server's worker."""
    return config.train_threads or max(1, _num_cores() // 2)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class RestartPauses:
    """The pauses before a worker that died is started again: 1, 2, 4, ... seconds.

    Attributes:
        SHORTEST: Seconds of the first one.
        LONGEST: Seconds.
        STEADY: A worker that lived for so many seconds is started again after the shortest pause.
    """

    SHORTEST, LONGEST, STEADY = 1.0, 60.0, 60.0

    def __init__(self) -> None:
        self._pause = 0.0

    def next(self, lasted: float = 0.0) -> float:
        """The seconds to wait.

        Args:
            lasted: Seconds that it lived.
        """
        is_first = not self._pause or lasted > self.STEADY
        self._pause = self.SHORTEST if is_first else min(self.LONGEST, 2 * self._pause)
        return self._pause


class TrainingWorker:
    """Keeps a worker running while there are jobs. All methods but `stop` return at once.

    Args:
        command: Starts a worker. It ends with 0 after some time without jobs, and soon after its stdin is closed.
        environment: Variables of the worker besides this process's own.
        has_jobs: Whether jobs wait or run; called in a thread, it may block and raise any error.
    """

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], has_jobs: Callable[[], bool]) -> None:
        self._command, self._environment, self._has_jobs = tuple(command), environment, has_jobs
        self._wake, self._stopping = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Look for jobs now, and from time to time."""
        self._thread = threading.Thread(target=self._supervise, name="prefixtune-training-worker", daemon=True)
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
        if self._thread is None:
            return
        self._thread.join(seconds)
        process = self._process
        if process is not None:
            log("worker_killed", level=logging.WARNING, worker=process.pid)
            process.kill()
            self._thread.join(10.0)

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        pauses = RestartPauses()
        while not self._stopping.is_set():
            self._wake.clear()
            began = time.monotonic()
            try:
                if not self._has_jobs():
                    self._wake.wait(_LOOK_SECONDS)
                    continue
                has_died = self._run()
            except Exception as error:
                # The database is away, or the system starts no process now. Without this thread, no worker would be.
                log("worker_failed", level=logging.WARNING, reason=getattr(error, "strerror", None) or str(error))
                self._stopping.wait(pauses.next())
                continue
            pauses = pauses if has_died else RestartPauses()
            # Afterwards its job may still be there, or another one that was queued while it ended.
            self._stopping.wait(pauses.next(time.monotonic() - began) if has_died else RestartPauses.SHORTEST)

    def _run(self) -> bool:
        """Run a worker to its end; returns whether it died."""
        lines = deque[str](maxlen=_MAX_LINES)
        process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, **self._environment},
            # Ctrl-C in a terminal reaches the server alone, and the worker by it.
            start_new_session=True,
        )
        self._process = process
        reader = threading.Thread(target=_read_output, args=(process, lines), daemon=True)
        reader.start()
        log("worker_started", worker=process.pid)
        while process.poll() is None and not self._stopping.is_set():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_POLL_SECONDS)
        # By a signal, a worker that got the same one with its whole group would take it for the second.
        assert process.stdin is not None
        process.stdin.close()
        code = process.wait()
        self._process = None
        # What the worker itself started may hold its output open: then the thread is left, and closes it later.
        reader.join(1.0)
        if code == 0 or self._stopping.is_set():
            log("worker_ended", worker=process.pid, code=code)
            return False
        log("worker_died", level=logging.ERROR, code=code, reason=" ".join(lines))
        return True


def _read_output(process: subprocess.Popen[bytes], lines: deque[str]) -> None:
    """Log a worker's JSON lines as the server's own, and keep its last other lines; closes its output at its end."""
    assert process.stdout is not None
    with contextlib.suppress(OSError, ValueError), process.stdout:
        # The rest of a longer line counts as the next one.
        while raw := process.stdout.readline(2**16):
            text = raw.decode("utf-8", "replace").strip()
            if (fields := _log_line(text)) is not None:
                level = logging.getLevelNamesMapping().get(str(fields.pop("level", "")).upper(), logging.INFO)
                log(str(fields.pop("event")), level=level, **{**fields, "worker": process.pid})
            elif text:
                lines.append(text[:_MAX_LINE])


def _log_line(text: str) -> dict[str, Any] | None:
    """The fields of a line of a log; None: it is none."""
    with contextlib.suppress(ValueError, RecursionError):
        made = json.loads(text)
        if isinstance(made, dict) and "event" in made:
            made.pop("time", None)
            made.pop("error", None)
            return made
    return None
