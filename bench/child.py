"""A side of a benchmark in a process of its own, which answers lines of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

from bench.results import ROOT, PeerError


class Child:
    """A process that says when it is ready, and answers each line with a line; it sleeps while it is asked nothing.

    Even an idle server may keep a core busy that another side needs.

    Args:
        name: Of the side, for people.
        command: That starts it.
        path: Its `PYTHONPATH`.

    Raises:
        PeerError: It does not start.
    """

    def __init__(self, name: str, command: Sequence[str], path: str) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1", "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        self._read()

    def answer(self, value: Any) -> Any:
        """Its answer to a value.

        Raises:
            PeerError: It has ended.
        """
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            self._signal(signal.SIGSTOP)
            return json.loads(line)
        self._process.wait(60)
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["no message"]
        self.close()
        raise PeerError(f"{self.name}: {lines[-1]}")

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it, and what it started."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self._process.communicate(timeout=30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.communicate()
        self._log.close()
