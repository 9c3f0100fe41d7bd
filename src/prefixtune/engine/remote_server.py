"""The HTTP server of another program that runs a model, and what is asked of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import Any, Self

import httpx2

from prefixtune.errors import BackboneError, RequestError

_SECONDS = httpx2.Timeout(600.0, connect=10.0)
"""Until the server has answered, or written its next token."""
_START_SECONDS = 3600
"""Until the model is loaded; after that, something hangs."""
_POLL_SECONDS, _LOOK_SECONDS = 0.1, 5.0
_LOOK_EVERY, _MOST_MISSED = 2.0, 3
"""Seconds between looks at a server that somebody else runs, and how many in a row it must fail to be gone."""
_MOST_SOCKET_BYTES = 107 if sys.platform == "linux" else 103
_DYING_SECONDS = 2.0
"""Between the end of a process's connections and its own."""


class Refused(RequestError):
    """The server refuses a request."""


class RemoteServer:
    """A server that has loaded the model; for one event loop.

    Args:
        program: What runs there, for messages.
        url: Its address.
        token: Sent with each request; empty: none is.
        process: Its process, in a session of its own, which ends soon after its stdin is closed; None: somebody else
            started it.
        folder: Of its socket, if it is ours.

    Attributes:
        process: Its process.
        alive: Whether it runs, as far as is known; never again, once it did not.
    """

    def __init__(
        self,
        program: str,
        url: str,
        token: str = "",
        process: subprocess.Popen[bytes] | None = None,
        folder: tempfile.TemporaryDirectory[str] | None = None,
    ) -> None:
        self.process, self._program, self._folder, self._is_up = process, program, folder, True
        self._looked, self._missed = 0.0, 0
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        socket, limits = None if folder is None else _socket_in(folder), httpx2.Limits(max_connections=None)
        transport = httpx2.AsyncHTTPTransport(uds=socket, limits=limits)
        self._client = httpx2.AsyncClient(base_url=url, headers=headers, transport=transport, timeout=_SECONDS)

    @classmethod
    async def start(cls, program: str, command: Sequence[str], hint: str, **environment: str) -> Self:
        """Start a server as a child process, and wait until it has loaded the model; its messages go to stderr.

        Args:
            program: What it is.
            command: Its last argument, the path of the socket that it must listen on, comes in addition.
            hint: What to do if it does not start.
            **environment: Variables, besides those of this process.

        Raises:
            BackboneError: It ends before, or takes an hour.
        """
        # In a folder of its own, so that nobody else can use it or take its place.
        folder = tempfile.TemporaryDirectory(prefix="prefixtune-", ignore_cleanup_errors=True)
        if len(os.fsencode(_socket_in(folder))) > _MOST_SOCKET_BYTES:
            folder.cleanup()
            what = (
                f"the folder for temporary files has a path that is too long for a socket: {tempfile.gettempdir()!r}."
            )
            raise BackboneError(what, hint="set TMPDIR to a short one, such as /tmp.")
        try:
            process = subprocess.Popen(
                [*command, _socket_in(folder)],
                stdin=subprocess.PIPE,
                # Standard output is for the answers of this program.
                stdout=2,
                env={**os.environ, **environment},
                # The terminal's signals are for the parent, which ends running texts first.
                start_new_session=True,
            )
        except OSError as error:
            folder.cleanup()
            raise BackboneError(f"cannot run {command[0]!r}: {error.strerror}.", hint=hint) from error
        server = cls(program, "http://localhost", process=process, folder=folder)
        try:
            async with asyncio.timeout(_START_SECONDS):
                while not await server._answers(if_busy=False):
                    if not server.alive:
                        code = f"exit code {process.returncode}; its messages are above"
                        raise BackboneError(f"{program} cannot serve this model ({code}).", hint=hint)
                    await asyncio.sleep(_POLL_SECONDS)
        except TimeoutError:
            await server.close()
            what = f"{program} has not started within {_START_SECONDS / 60:.0f} minutes."
            raise BackboneError(what, hint="see its messages above.") from None
        except BaseException:
            await server.close()
            raise
        return server

    @property
    def alive(self) -> bool:
        """Whether it runs, as far as is known; never again, once it did not."""
        return self._is_up and (self.process is None or self.process.poll() is None)

    async def look(self) -> bool:
        """The same, after a look at a server that somebody else runs: one that often gives no answer is gone."""
        now = time.monotonic()
        if self.alive and self.process is None and now - self._looked >= _LOOK_EVERY:
            self._looked = now
            self._missed = 0 if await self._answers(if_busy=True) else self._missed + 1
            self._is_up = self._missed < _MOST_MISSED
        return self.alive

    async def is_dying(self) -> bool:
        """Whether it has ended, or does so in a moment, after a connection to it has failed."""
        if self.process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DYING_SECONDS):
                    while self.process.poll() is None:
                        await asyncio.sleep(_POLL_SECONDS)
            return not self.alive
        return not await self._answers(if_busy=True)

    async def close(self, seconds: float = 10.0) -> None:
        """End it, if it is ours, with all processes that it started; after some seconds they are killed."""
        self._is_up = False
        await self._client.aclose()
        if self.process is not None:
            await asyncio.to_thread(_end, self.process, seconds)
        if self._folder is not None:
            self._folder.cleanup()

    async def _answers(self, *, if_busy: bool) -> bool:
        """Whether it says that it is well; `if_busy` where it takes it, and says nothing for some seconds."""
        try:
            return bool((await self._client.get("/health", timeout=_LOOK_SECONDS)).status_code == httpx2.codes.OK)
        except httpx2.ReadTimeout:
            return if_busy
        except httpx2.TransportError:
            return False

    async def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """Its answer to a request.

        Args:
            path: Where it is asked.
            body: What it is asked for; None: the request is a GET.

        Raises:
            Refused: It refuses.
            RequestError: It cannot do it.
            OSError: It cannot be reached.
        """
        async with self._send("GET" if body is None else "POST", path, body) as response:
            return json.loads(await response.aread())

    async def stream(self, path: str, body: Mapping[str, Any]) -> AsyncGenerator[Mapping[str, Any]]:
        """The events of a text; whoever closes the stream early ends it.

        Args:
            path: Where it is asked.
            body: What it is asked for.

        Raises:
            Refused: It refuses.
            RequestError: It failed.
            OSError: It cannot be reached, or the connection ends before the text.
        """
        async with self._send("POST", path, body) as response:
            ending = b""
            async for part in response.aiter_bytes():
                # `aiter_lines` would also divide it at characters such as U+2028, which JSON texts may hold.
                *lines, ending = (ending + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:].decode("utf-8", "replace"))
                        if "error" in event:
                            message = event["error"].get("message")
                            raise RequestError(f"{self._program}: {message}", hint="see its log.")
                        yield event
        raise ConnectionError(f"the server of {self._program} has ended in the middle of a text.")

    @contextlib.asynccontextmanager
    async def _send(self, method: str, path: str, body: Mapping[str, Any] | None) -> AsyncIterator[httpx2.Response]:
        """Ask; the answer can be read while the block runs."""
        if not self._is_up:
            raise ConnectionError(f"{self._program} has ended.")
        try:
            async with self._client.stream(method, path, json=body) as response:
                if response.status_code != httpx2.codes.OK:
                    error = Refused if response.status_code == httpx2.codes.BAD_REQUEST else RequestError
                    reason = _message(await response.aread())
                    raise error(f"{self._program} refuses it ({response.status_code}): {reason}", hint="see its log.")
                yield response
        except httpx2.TransportError as error:
            raise ConnectionError(f"{self._program} cannot be reached: {error or type(error).__name__}") from error


def _socket_in(folder: tempfile.TemporaryDirectory[str]) -> str:
    # llama.cpp knows it by its ending.
    return os.path.join(folder.name, "server.sock")


def _end(process: subprocess.Popen[bytes], seconds: float) -> None:
    with contextlib.suppress(OSError):
        if process.stdin is not None:
            process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
    process.kill()
    if hasattr(os, "killpg"):
        with contextlib.suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _message(content: bytes) -> str:
    """What an error says."""
    try:
        return str(json.loads(content)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return "no reason is given."
