"""Requests about training in front of vLLM: passed on to the training server and back, or refused."""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn

from asgi_client import Response, send
from fake_vllm import FakeVLLM
from prefixtune.interop.vllm.middleware import PrefixMiddleware
from prefixtune.interop.vllm.training import is_about_training


class TrainingServer:
    """Says what it is asked; how it answers depends on the path."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.go_on, self.gone = threading.Event(), threading.Event()

    async def __call__(self, scope: Any, receive: Any, reply: Any) -> None:
        self.requests.append(scope["path"])
        if scope["path"] == "/v1/files/refused":
            return await self._answer(reply, 413, {"error": {"code": "file_too_large"}})
        if scope["path"] == "/v1/files/cut":
            start = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]}
            await reply(start)
            await reply({"type": "http.response.body", "body": b"abc", "more_body": True})
            raise ConnectionError
        if scope["path"].endswith("/events"):
            return await self._stream(receive, reply)
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        heard = {
            "method": scope["method"],
            "path": scope["path"],
            "query": scope["query_string"].decode(),
            "headers": {name.decode(): value.decode() for name, value in scope["headers"]},
            "bytes": len(body),
            "digest": hashlib.sha256(body).hexdigest(),
        }
        return await self._answer(reply, 200, heard)

    async def _answer(self, reply: Any, status: int, value: Any) -> None:
        body = json.dumps(value).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        await reply({"type": "http.response.start", "status": status, "headers": [*headers, (b"keep-alive", b"x")]})
        await reply({"type": "http.response.body", "body": body if status else b""})

    async def _stream(self, receive: Any, reply: Any) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await reply({"type": "http.response.start", "status": 200, "headers": headers})
        await reply({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await receive()
        gone = asyncio.ensure_future(receive())
        while not self.go_on.is_set() and not gone.done():
            await asyncio.sleep(0.01)
        if gone.done():
            assert gone.result()["type"] == "http.disconnect"
            self.gone.set()
            return
        gone.cancel()
        await reply({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


@pytest.fixture
def training(tmp_path: Path, app: FakeVLLM) -> Iterator[TrainingServer]:
    """A training server that vLLM's application knows."""
    server = TrainingServer()
    socket = tmp_path / "s"
    config = uvicorn.Config(server, uds=str(socket), lifespan="off", log_config=None, server_header=True)
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    app.options["training_socket"] = str(socket)
    yield server
    running.should_exit = True
    thread.join(10)


def ask(app: FakeVLLM, method: str, path: str, body: Any = None, **options: Any) -> Response:
    """A request through the middleware."""

    async def served(scope: Any, receive: Any, reply: Any) -> None:
        await PrefixMiddleware(app)({**scope, "app": SimpleNamespace(state=app.state)}, receive, reply)

    headers = {} if body is None else {"content-length": str(len(body))}
    return asyncio.run(send(served, method, path, body, headers={**headers, **options.pop("headers", {})}, **options))


def test_an_upload_passes_whole_without_the_key_and_the_headers_of_a_connection(app: FakeVLLM, training: Any):
    app.state.args.api_key = "vllms"
    body = bytes(range(256)) * 8000
    sent = {"authorization": "Bearer vllms", "connection": "x-one", "te": "trailers", "x-forwarded-for": "6.6.6.6"}
    sent["origin"] = "http://models.example"
    response = ask(app, "POST", "/v1/files?a=1&b=%2F", body, headers=sent)
    heard = response.json
    assert response.status == 200
    assert (heard["method"], heard["path"], heard["query"]) == ("POST", "/v1/files", "a=1&b=%2F")
    assert (heard["bytes"], heard["digest"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert heard["headers"]["host"] == "localhost"
    assert heard["headers"]["content-type"] == "application/json"
    assert not {"authorization", "te", "origin", "x-forwarded-for"} & heard["headers"].keys()
    assert not {"keep-alive", "date", "server"} & response.headers.keys()
    chunked = ask(app, "POST", "/v1/files", body, headers={"transfer-encoding": "chunked"})
    assert chunked.json["bytes"] == len(body)


def test_without_keys_the_training_server_sees_who_was_called(app: FakeVLLM, training: Any):
    sent = {"host": "evil.example", "origin": "http://evil.example", "x-forwarded-for": "6.6.6.6"}
    headers = ask(app, "GET", "/v1/files", headers=sent).json["headers"]
    assert {name: headers[name] for name in sent} == sent


def test_events_arrive_one_by_one(app: FakeVLLM, training: TrainingServer):
    pieces = 0

    async def before_reading() -> None:
        nonlocal pieces
        pieces += 1
        training.go_on.set()

    response = ask(app, "GET", "/v1/fine_tuning/jobs/1/events", before_reading=before_reading)
    assert response.body == b"data: 1\n\ndata: [DONE]\n\n"
    assert response.ended
    assert pieces >= 2


def test_a_client_that_leaves_ends_its_request_there_too(app: FakeVLLM, training: TrainingServer):
    disconnected = asyncio.Event()

    async def leave() -> None:
        disconnected.set()

    response = ask(app, "GET", "/v1/fine_tuning/jobs/1/events", disconnected=disconnected, before_reading=leave)
    assert not response.ended
    assert training.gone.wait(5)


def test_an_early_answer_arrives_though_the_body_was_not_read(app: FakeVLLM, training: Any):
    response = ask(app, "POST", "/v1/files/refused", b"x" * 2**24)
    assert (response.status, response.code) == (413, "file_too_large")


def test_whoever_has_no_key_of_vllms_is_refused(app: FakeVLLM, training: TrainingServer):
    app.state.args.api_key, app.status, app.reply = "vllms", 401, {"error": "Unauthorized"}
    for method, path in (("POST", "/v1/files"), ("GET", "/v1/fine_tuning/jobs"), ("DELETE", "/v1/models/a")):
        assert ask(app, method, path).status == 401
    assert training.requests == []
    # The page asks for the key itself.
    assert ask(app, "GET", "/train").status == 200


def test_a_training_server_that_does_not_run_is_503(app: FakeVLLM, tmp_path: Path):
    app.options["training_socket"] = str(tmp_path / "none")
    response = ask(app, "GET", "/v1/files")
    assert response.status == 503
    assert response.json["error"]["type"] == "server_error"
    assert "does not run now" in response.json["error"]["message"]


def test_a_response_that_is_cut_off_stays_incomplete(app: FakeVLLM, training: Any):
    response = ask(app, "GET", "/v1/files/cut")
    assert (response.status, response.body, response.ended) == (200, b"abc", False)


@pytest.mark.parametrize("path", ["/v1/files/a b/../%2e?x", "/v1/files/%41/\u00e4"])
def test_a_path_is_passed_on_as_it_was_checked(app: FakeVLLM, training: TrainingServer, path: str):
    assert ask(app, "GET", path).json["path"] == path.partition("?")[0]


@pytest.mark.parametrize(
    ("method", "path", "expected"),
    [
        ("GET", "/train", True),
        ("DELETE", "/v1/models/a", True),
        ("GET", "/v1/models/a/file", True),
        ("PUT", "/v1/models/a/file", False),
        ("GET", "/v1/models/a", False),
        ("OPTIONS", "/v1/models/a", False),
    ],
)
def test_what_is_about_training(method: str, path: str, expected: bool):
    assert is_about_training({"method": method, "headers": []}, path) is expected
