"""The HTTP server of another program that runs a model, and what is asked of it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from prefixtune.errors import RequestError

__all__ = ["SOCKET", "Opened", "Refused", "RemoteServer"]


SOCKET = "socket"
"""The name of a server's socket in its folder."""
_SECONDS = 600.0
"""Until the server has answered, or written its next token."""
_DYING_SECONDS = 2.0
"""Between the end of a process's connections and its own."""

_LOOK_SECONDS = 1.0
"""Between looks at a server that somebody else runs."""

Opened = Callable[[socket.socket], None]


class Refused(RequestError):
    """The server refuses a request."""


class RemoteServer:
    """A server that has loaded the model. May be used from any thread.

    Args:
        program: What runs there, for messages.
        url: Its address.
        token: Sent with each request; empty: none is.
        process: Its process, in a session of its own, which ends soon after its stdin is closed; None: somebody else
            started it.
        folder: Of its socket, if it listens on one there; removed with it.

    Attributes:
        url: Its address.
    """

    def __init__(
        self,
        program: str,
        url: str,
        token: str = "",
        process: subprocess.Popen[Any] | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.url, self._is_up, self._folder = url, True, folder
        self._program, self._parts, self._token, self._process = program, urlsplit(url), token, process
        self._looked = time.monotonic()

    @property
    def pid(self) -> int:
        """Of its process; 0: it is not ours."""
        return 0 if self._process is None else self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it runs, as far as is known; never again, once it did not."""
        return self._is_up and (self._process is None or self._process.poll() is None)

    def look(self) -> bool:
        """The same, after a look at a server that somebody else runs."""
        if self.alive and self._process is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            self._is_up, self._looked = self.answers("/health"), time.monotonic()
        return self.alive

    def is_dying(self) -> bool:
        """Whether it has ended, or does so in a moment, after a connection to it has failed."""
        if self._process is None:
            return not self.answers("/health")
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_DYING_SECONDS)
        return self._process.poll() is not None

    def close(self, seconds: float = 10.0) -> None:
        """End it, if it is ours, with all processes that it started; after some seconds they are killed."""
        self._is_up = False
        if self._process is None:
            return
        with contextlib.suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        self._process.kill()
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._folder is not None:
            self._folder.cleanup()

    def answers(self, path: str, seconds: float = 5.0) -> bool:
        """Whether it answers there with 200."""
        try:
            with self._send("GET", path, seconds=seconds):
                return True
        except (OSError, http.client.HTTPException, RequestError):
            return False

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Its answer to a request.

        Args:
            path: Where it is asked.
            body: What it is asked for; None: the request is a GET.

        Raises:
            Refused: It refuses.
            RequestError: It cannot do it.
            OSError: It cannot be reached.
        """
        with self._send("GET" if body is None else "POST", path, body) as response:
            return json.loads(response.read())

    def stream(self, path: str, body: Mapping[str, Any], opened: Opened) -> Generator[Mapping[str, Any]]:
        """The events of a text; whoever has read the last one closes the stream.

        Args:
            path: Where it is asked.
            body: What it is asked for.
            opened: Called with the connection before anything is sent; whoever shuts it down ends the text.

        Raises:
            Refused: It refuses.
            RequestError: It failed.
            OSError: It cannot be reached, or the connection ends before the text.
        """
        with self._send("POST", path, body, opened) as response:
            for line in response:
                if line.startswith(b"data: {"):
                    event = json.loads(line[6:])
                    if "error" in event:
                        message = event["error"].get("message")
                        raise RequestError(f"{self._program}: {message}", hint="see its log.")
                    yield event
        raise ConnectionError(f"the server of {self._program} has ended in the middle of a text.")

    @contextlib.contextmanager
    def _send(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        opened: Opened | None = None,
        seconds: float = _SECONDS,
    ) -> Iterator[http.client.HTTPResponse]:
        """Ask; the answer can be read while the block runs."""
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        with contextlib.closing(kind(self._parts.hostname or "", self._parts.port, timeout=seconds)) as connection:
            if self._folder is None:
                connection.connect()
            else:
                connection.sock = socket.socket(socket.AF_UNIX)
                connection.sock.settimeout(seconds)
                connection.sock.connect(os.path.join(self._folder.name, SOCKET))
            if opened is not None:
                opened(connection.sock)
            headers = {"Content-Type": "application/json"}
            headers |= {"Authorization": f"Bearer {self._token}"} if self._token else {}
            content = None if body is None else json.dumps(body)
            connection.request(method, f"{self._parts.path.rstrip('/')}{path}", content, headers)
            with connection.getresponse() as response:
                if response.status != http.HTTPStatus.OK:
                    error = Refused if response.status == http.HTTPStatus.BAD_REQUEST else RequestError
                    reason = _message(response.read(2**16))
                    raise error(f"{self._program} refuses it ({response.status}): {reason}", hint="see its log.")
                yield response


def _message(content: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason is given."
