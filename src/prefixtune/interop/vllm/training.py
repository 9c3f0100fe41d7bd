"""Requests about training, passed on to the training server: a process beside vLLM that listens on a Unix socket.

Bodies and responses are streamed both ways. The training server has no keys, so whoever forwards must have checked the
client's key; only processes of the same user can open the socket.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from urllib.parse import quote

import h11

from prefixtune.interop.vllm.http import APIError, Message, Receive, Scope, Send, send_json

__all__ = ["TrainingForwarder", "is_about_training", "needs_key"]


_FOLDERS = ("/v1/files", "/v1/fine_tuning")
_PAGE = "/train"
_MODELS = "/v1/models/"
_CONNECT_SECONDS = 5.0
_SILENT_SECONDS = 600.0
"""Longest wait for the training server. Its own limits are shorter: it refuses late requests, and streams go on."""
_STALLED_SECONDS = 60.0
"""Longest wait until a piece is taken, by the client or by the training server."""
_PIECE = 2**16
_OF_A_CONNECTION = {
    *(b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection"),
    *(b"te", b"trailer", b"transfer-encoding", b"upgrade"),
}
"""Headers that are not about the request or the response, but about the connection that it came by."""
# The key is vLLM's; `expect` was answered when the body was first read.
_NOT_SENT = _OF_A_CONNECTION | {b"authorization", b"expect"}
# Without keys, the training server refuses other hosts, proxies and other sites' pages by these; a key says enough.
_OF_OPEN_SERVERS = (b"host", b"origin", b"forwarded", b"via", b"x-forwarded-for", b"x-forwarded-host", b"x-real-ip")
# vLLM's server adds its own.
_NOT_RETURNED = _OF_A_CONNECTION | {b"date", b"server"}


def is_about_training(scope: Scope, path: str) -> bool:
    """Whether a request is for the training server: files, jobs, their page; a result's file, and deleting it."""
    if path == _PAGE or any(path == folder or path.startswith(f"{folder}/") for folder in _FOLDERS):
        return True
    method = scope["method"]
    if method == "OPTIONS" and (b"access-control-request-method", b"DELETE") in scope["headers"]:
        # vLLM would allow pages of other origins to delete.
        method = "DELETE"
    return path.startswith(_MODELS) and (method == "DELETE" or (method in ("GET", "HEAD") and path.endswith("/file")))


def needs_key(path: str) -> bool:
    """Whether such a request needs a key, where vLLM asks for one: all do, but for the page."""
    return path != _PAGE


class TrainingForwarder:
    """Passes requests on.

    Args:
        socket: Path of the training server's socket.
        has_keys: vLLM asks clients for a key, which they have shown.
    """

    def __init__(self, socket: str, *, has_keys: bool) -> None:
        self._socket, self._has_keys = socket, has_keys

    async def forward(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        """Have the training server answer a request.

        Args:
            scope: The request's.
            path: Of the request, decoded.
            receive: Gives the request's body.
            send: Takes the response; 503 where there is no training server now.
        """
        try:
            request = self._request(scope, path)
        except h11.LocalProtocolError as error:
            return await _refuse(send, APIError(f"this is not a valid request: {error}."))
        try:
            async with asyncio.timeout(_CONNECT_SECONDS):
                reader, writer = await asyncio.open_unix_connection(self._socket)
        except (OSError, TimeoutError):
            message = "the server for training does not run now; try again later."
            return await _refuse(send, APIError(message, status=503))
        try:
            await _Exchange(reader, writer, receive, send).run(request)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _request(self, scope: Scope, path: str) -> h11.Request:
        dropped = {*_NOT_SENT, *(_OF_OPEN_SERVERS if self._has_keys else ())}
        headers = [(name, value) for name, value in scope["headers"] if name.lower() not in dropped]
        if any(name.lower() == b"transfer-encoding" for name, _ in scope["headers"]):
            headers = [pair for pair in headers if pair[0].lower() != b"content-length"]
            headers.append((b"transfer-encoding", b"chunked"))
        if self._has_keys:
            headers.append((b"host", b"localhost"))
        query = bytes(scope.get("query_string") or b"")
        # Quoted anew, so that what was checked and what is sent cannot differ.
        target = quote(path, safe="/~:@!$&'()*+,;=").encode() + (b"?" + query if query else b"")
        return h11.Request(method=scope["method"], target=target, headers=headers)


class _Exchange:
    """One request and its response."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, receive: Receive, send: Send
    ) -> None:
        self._reader, self._writer, self._receive, self._send = reader, writer, receive, send
        self._connection = h11.Connection(h11.CLIENT)
        self._has_started = False

    async def run(self, request: h11.Request) -> None:
        """Send both on, until the response has been sent or the client has disconnected."""
        upload = asyncio.create_task(self._send_request(request))
        download = asyncio.create_task(self._send_response())
        try:
            await asyncio.wait((upload, download), return_when=asyncio.FIRST_COMPLETED)
            if not download.done() and not upload.result():
                # It is answered before its whole body was read.
                await asyncio.wait((download,))
            if download.done():
                download.result()
        except (OSError, TimeoutError, h11.ProtocolError):
            # A response that has begun is cut off: vLLM's server then closes the connection.
            if not self._has_started:
                message = "the server for training has ended before it answered; try again later."
                await _refuse(self._send, APIError(message, status=503))
        finally:
            for task in (upload, download):
                task.cancel()
            await asyncio.gather(upload, download, return_exceptions=True)

    async def _send_request(self, request: h11.Request) -> bool:
        """Send a request with its body, then wait until the client disconnects; False: no more is read of it."""
        try:
            await self._write(request)
            while (message := await self._receive())["type"] == "http.request":
                if self._connection.our_state is not h11.SEND_BODY:
                    continue
                if body := message.get("body", b""):
                    await self._write(h11.Data(data=body))
                if not message.get("more_body"):
                    await self._write(h11.EndOfMessage())
        except (OSError, TimeoutError, h11.LocalProtocolError):
            return False
        return True

    async def _write(self, event: h11.Event) -> None:
        self._writer.write(self._connection.send(event) or b"")
        async with asyncio.timeout(_STALLED_SECONDS):
            await self._writer.drain()

    async def _send_response(self) -> None:
        async for event in self._events():
            for message in _messages(event):
                self._has_started = True
                async with asyncio.timeout(_STALLED_SECONDS):
                    await self._send(message)

    async def _events(self) -> AsyncIterator[h11.Event]:
        """What the training server sends, up to the end of its response."""
        while True:
            event = self._connection.next_event()
            if event is h11.NEED_DATA:
                async with asyncio.timeout(_SILENT_SECONDS):
                    self._connection.receive_data(await self._reader.read(_PIECE))
            elif isinstance(event, h11.Event):
                yield event
                if isinstance(event, h11.EndOfMessage):
                    return
            else:
                raise h11.RemoteProtocolError("the response is not complete")


def _messages(event: h11.Event) -> Iterator[Message]:
    """What ASGI sends of a response for what HTTP sent."""
    if isinstance(event, h11.Response):
        headers = [(name, value) for name, value in event.headers if name not in _NOT_RETURNED]
        yield {"type": "http.response.start", "status": event.status_code, "headers": headers}
    elif isinstance(event, h11.Data):
        yield {"type": "http.response.body", "body": bytes(event.data), "more_body": True}
    elif isinstance(event, h11.EndOfMessage):
        yield {"type": "http.response.body", "body": b"", "more_body": False}


async def _refuse(send: Send, error: APIError) -> None:
    await send_json(send, error.status, error.to_dict())
