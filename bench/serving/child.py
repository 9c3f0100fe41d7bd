"""A side of a benchmark in a process of its own, which answers lines of JSON."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.results import PeerError

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """A process that says when it is ready, and answers each line with a line.

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
            env={**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
        )
        self._read()

    def answer(self, value: Any) -> Any:
        """Its answer to a value.

        Raises:
            PeerError: It has ended.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._process.wait(60)
        self._log.seek(0)
        lines = self._log.read().strip().splitlines() or ["no message"]
        raise PeerError(f"{self.name}: {lines[-1]}")

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()
