"""Servers to measure, and the one client that asks them all: by OpenAI's completions, streamed."""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from bench.results import ROOT, PeerError

START_SECONDS, ANSWER_SECONDS = 900, 600


@dataclass
class Done:
    """What a side did with the requests of a round.

    Attributes:
        seconds: Until the last one was answered.
        texts: The answers.
        tokens: Their tokens.
        first: Seconds to the first piece of each answer.
        between: Seconds between pieces.
    """

    seconds: float = 0.0
    texts: list[str] = field(default_factory=list)
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)


class Server:
    """A server in a group of processes of its own, which sleeps while it is asked nothing.

    Even an idle server may keep a core busy that another side needs.

    Args:
        name: Of the side, for people.
        command: That starts it; `{port}` stands for its port.
        path: Its `PYTHONPATH`.

    Raises:
        PeerError: It does not start.
    """

    def __init__(self, name: str, command: Sequence[str], path: str = "") -> None:
        self.name = name
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [word.replace("{port}", str(self.port)) for word in command],
            stdout=self._log,
            stderr=self._log,
            cwd=ROOT,
            env={"VLLM_CPU_KVCACHE_SPACE": "2", **os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"},
            start_new_session=True,
        )
        end = time.monotonic() + START_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None or time.monotonic() > end:
                self._log.seek(0)
                lines = self._log.read().strip().splitlines() or ["no message"]
                self.close()
                raise PeerError(f"{name} did not start: {' '.join(lines[-3:])[-500:]}")
            time.sleep(0.2)
        self._signal(signal.SIGSTOP)

    def _is_ready(self) -> bool:
        """By the path of vLLM and llama.cpp, or by ours."""
        for path in ("/health", "/readyz"):
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
            with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
                connection.request("GET", path)
                if connection.getresponse().status == http.HTTPStatus.OK:
                    return True
        return False

    def complete(self, bodies: Sequence[Mapping[str, Any]]) -> Done:
        """Ask all requests at once.

        Raises:
            PeerError: One is not answered.
        """
        self._signal(signal.SIGCONT)
        began = time.perf_counter()
        try:
            with ThreadPoolExecutor(len(bodies)) as pool:
                answers = list(pool.map(self._ask, bodies))
        finally:
            self._signal(signal.SIGSTOP)
        done = Done(max(times[-1] for times, _, _ in answers) - began)
        for times, text, count in answers:
            done.texts.append(text)
            done.tokens += count
            done.first.append(times[0] - began)
            done.between += [later - earlier for earlier, later in itertools.pairwise(times)]
        return done

    def _ask(self, body: Mapping[str, Any]) -> tuple[list[float], str, int]:
        """When each piece of an answer came, its text, and how many tokens it has."""
        times, text, count = [], "", 0
        asked = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}, **body}
        headers = {"Content-Type": "application/json"}
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as one:
            one.request("POST", "/v1/completions", json.dumps(asked), headers)
            response = one.getresponse()
            if response.status != http.HTTPStatus.OK:
                raise PeerError(f"{self.name} refuses a request: {response.read(500)!r}")
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    for choice in event.get("choices", ()):
                        times.append(time.perf_counter())
                        text += choice["text"]
                    count = (event.get("usage") or {}).get("completion_tokens", count)
        if not times:
            raise PeerError(f"{self.name} ended in the middle of an answer")
        return times, text, count

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def close(self) -> None:
        """End it, and what it started."""
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGKILL)
            self._process.wait()
        self._log.close()
