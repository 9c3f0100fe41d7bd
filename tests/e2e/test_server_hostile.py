"""A real server under attack, over sockets on this machine: slow and silent clients, and bytes that are no requests."""

from __future__ import annotations

import contextlib
import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.server.auth import hash_key

FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}: {food}"}
HEADER_SECONDS, CLIENT_SECONDS, KEEP_ALIVE, DEADLINE = 1.0, 4.0, 3.0, 4.0
CONNECTIONS, PER_ADDRESS = 60, 40
HEAD = b"Host: x\r\nAuthorization: Bearer pt-me\r\nContent-Type: application/json\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    make_prefix(backbone, folder / "prefixes" / "mine.safetensors", 0, task="records", text_format=FORMAT)
    make_prefix(backbone, folder / "prefixes" / "pubs.safetensors", 1, task="e2e")
    make_prefix(backbone, folder / "prefixes" / "doc.safetensors", 2, task="summarization")
    (folder / "serve.toml").write_text(
        "max_tokens = 6\ndefault_max_tokens = 6\n"
        f"header_timeout = {HEADER_SECONDS}\nclient_timeout = {CLIENT_SECONDS}\n"
        f"keep_alive = {KEEP_ALIVE}\ndeadline = {DEADLINE}\nmax_connections = {CONNECTIONS}\n"
        f"max_connections_per_address = {PER_ADDRESS}\n"
        f'[keys.me]\nhash = "{hash_key("pt-me")}"\nadmin = true\n'
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml")).wait()
    yield server
    assert server.stop() == 0
    assert "Traceback" not in "".join(server.errors)
    assert not [line for line in server.lines if line["level"] == "error"]


def connect(server: LiveServer, source: str = "127.0.0.1") -> socket.socket:
    host, _, port = server.url.removeprefix("http://").partition(":")
    return socket.create_connection((host, int(port)), timeout=10, source_address=(source, 0))


def until_closed(connection: socket.socket, seconds: float = 15) -> tuple[float, bytes]:
    """Seconds until the server ends the connection, and what it sent."""
    started, received = time.monotonic(), b""
    connection.settimeout(seconds)
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            received += piece
    return time.monotonic() - started, received


def send_slowly(connection: socket.socket, data: bytes, seconds: float = 0.1) -> None:
    def send() -> None:
        with contextlib.suppress(OSError):
            for byte in data:
                connection.sendall(bytes([byte]))
                time.sleep(seconds)

    threading.Thread(target=send, daemon=True).start()


def is_served(server: LiveServer) -> bool:
    body = {"model": "mine", "prompt": "a", "max_tokens": 2}
    return server.post("/v1/completions", body, key="pt-me")[0] == 200


# --- slow and silent --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("start", "slow", "status", "least", "most"),
    [
        pytest.param(b"", b"", b"", HEADER_SECONDS, 3, id="silent from the start"),
        pytest.param(b"", b"GET / HTTP/1.1\r\nX: " + b"a" * 200, b"", HEADER_SECONDS, 3, id="slow header"),
        pytest.param(
            b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Content-Length: 500\r\n\r\n", b" " * 300, b" 408 ",
            CLIENT_SECONDS, CLIENT_SECONDS + HEADER_SECONDS + 2, id="slow body",
        ),
        pytest.param(
            b"PUT /admin/prefixes/new HTTP/1.1\r\n" + HEAD + b"Content-Length: 500\r\n\r\n", b" " * 300, b" 408 ",
            DEADLINE, DEADLINE + HEADER_SECONDS + 2, id="slow upload",
        ),
        pytest.param(
            HEALTH + b"Content-Length: 500\r\n\r\n", b" " * 300, b" 200 ", HEADER_SECONDS, 3, id="slow body unread",
        ),
        pytest.param(HEALTH + b"Content-Length: 5\r\n\r\n", b"", b" 200 ", HEADER_SECONDS, 3, id="body never sent"),
        pytest.param(HEALTH + b"\r\n", b"", b" 200 ", KEEP_ALIVE, KEEP_ALIVE + 2, id="idle after a request"),
    ],
)  # fmt: skip
def test_slow_clients_are_disconnected(
    server: LiveServer, start: bytes, slow: bytes, status: bytes, least: float, most: float
) -> None:
    with connect(server) as connection:
        connection.sendall(start)
        send_slowly(connection, slow)
        seconds, received = until_closed(connection)
    assert status in received[:20]
    # Half a second for a slow machine's clock.
    assert least - 0.5 <= seconds <= most


def test_clients_that_do_not_read_are_disconnected(server: LiveServer) -> None:
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        connection.settimeout(0.5)
        request = b"GET /openapi.json HTTP/1.1\r\n" + HEAD + b"\r\n"
        with contextlib.suppress(TimeoutError):
            for _ in range(20_000):
                connection.sendall(request)
        assert is_served(server)
        # It did not read, and so learns of the end by writing.
        server.until(lambda: is_cut_off(connection, request), CLIENT_SECONDS + 5)


def is_cut_off(connection: socket.socket, data: bytes) -> bool:
    try:
        connection.sendall(data)
    except TimeoutError:
        return False
    except ConnectionError:
        return True
    return False


def test_silent_connections_make_room_for_requests(server: LiveServer) -> None:
    with contextlib.ExitStack() as stack:
        for index in range(2 * CONNECTIONS):
            # From several addresses of this machine, so that no single one has too many.
            stack.enter_context(connect(server, f"127.0.0.{2 + index % 4}"))
        for _ in range(5):
            assert is_served(server)
    assert is_served(server)


def test_one_address_cannot_take_all_connections(server: LiveServer) -> None:
    long = {"model": "mine", "prompt": "a", "max_tokens": 6}
    body = json.dumps(long).encode()
    request = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode()
    with contextlib.ExitStack() as stack:
        # Each holds a request whose body does not end: none of them is idle.
        for _ in range(PER_ADDRESS):
            stack.enter_context(connect(server, "127.0.0.7")).sendall(request)
        server.until(lambda: server.metric("prefixtune_open_requests", key="pt-me") >= PER_ADDRESS)
        with connect(server, "127.0.0.7") as one_more:
            received = until_closed(one_more)[1]
        assert b" 503 Service Unavailable" in received
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["code"] == "too_many_connections"
        assert is_served(server)


# --- long texts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/tasks/mine", {"name": "a" + " " * 400_000 + "b", "food": "c"}),
        ("/v1/tasks/doc", {"document": "a" + " " * 400_000 + "b"}),
        ("/v1/tasks/doc", {"document": "a" + " \t\r\t " * 80_000 + "b"}),
        ("/v1/tasks/pubs", {"mr": "name[a" + " " * 400_000 + "]"}),
        ("/v1/tasks/pubs", {"mr": "[" * 400_000}),
        ("/v1/tasks/doc", {"document": [[]] * 100_000}),
        ("/v1/completions", {"model": "mine", "prompt": "a" * 900_000}),
        ("/v1/completions", {"model": "mine", "prompt": "a", "x" * 500_000: 1}),
        ("/v1/completions", {"model": "mine", "prompt": ["a"] * 200_000}),
        ("/v1/completions", {"model": "mine", "prompt": [1] * 300_000}),
        ("/v1/completions", {"model": "mine", "prompt": "a", "stop": ["b" * 1000] * 400}),
        ("/v1/chat/completions", {"model": "mine", "messages": [{"role": "user", "content": "a"}] * 20_000}),
        ("/v1/completions", {"model": "mine", "prompt": [[]] * 250_000}),
        ("/v1/completions", {"model": "mine", **{str(index): 0 for index in range(80_000)}}),
        ("/v1/chat/completions", {"model": "mine", "messages": [{}] * 250_000}),
        ("/v1/chat/completions", {"model": "mine", "messages": [0] * 340_000}),
        ("/v1/chat/completions", {"model": "mine", "messages": [{"role": "user", "content": [{}] * 250_000}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(reversed(value))[:9],
)
def test_a_hostile_text_does_not_delay_others(server: LiveServer, path: str, body: dict[str, Any]) -> None:
    with ThreadPoolExecutor(1) as pool:
        started, waits = time.monotonic(), []
        hostile = pool.submit(server.post, path, body, key="pt-me")
        while not hostile.done() or len(waits) < 5:
            asked = time.monotonic()
            assert server.get("/healthz")[0] == 200
            waits.append(time.monotonic() - asked)
        seconds = time.monotonic() - started
    status, answer, _ = hostile.result()
    # Blanks around a value say nothing.
    assert status in (200, 400), answer
    assert len(json.dumps(answer)) < 5000
    # Minutes where the time grows with the square; a slow machine has its seconds.
    assert seconds < 10
    assert max(waits) < 1


# --- no HTTP ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"\x00" * 100 + b"\r\n\r\n", b"GET\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"X: " + b"a" * 70_000, b"GET /" + b"a" * 70_000, b"G" * 20_000,
        b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n bad: folded\r\nno colon\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZZ\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabcde\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"f" * 30 + b"\r\n",
        b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}XX\r\n",
    ],
)  # fmt: skip
def test_invalid_http_is_400_and_closes_the_connection(server: LiveServer, data: bytes) -> None:
    with connect(server) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(data)
        seconds, received = until_closed(connection)
    assert b"HTTP/1.1 400 Bad Request" in received[:30]
    assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["type"] == "invalid_request_error"
    assert seconds < HEADER_SECONDS + 2


def test_an_endless_body_ends_at_its_limit(server: LiveServer) -> None:
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    with connect(server) as connection:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\n" + HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(ConnectionError, TimeoutError):
            for _ in range(400):
                connection.sendall(piece)
        received = until_closed(connection)[1]
    assert b" 413 " in received[:20] or received == b""
    assert is_served(server)


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    body = json.dumps({"model": "mine", "prompt": "a", "max_tokens": 2}).encode()
    complete = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    nothing = b"GET /none HTTP/1.1\r\n" + HEAD + b"\r\n"
    last = b"GET /healthz HTTP/1.1\r\nConnection: close\r\n" + HEAD + b"\r\n"
    with connect(server) as connection:
        connection.sendall((complete + nothing) * 20 + last)
        received = until_closed(connection)[1]
    assert re.findall(rb"HTTP/1\.1 (\d+)", received) == [b"200", b"404"] * 20 + [b"200"]


def test_abandoned_streams_leave_nothing_behind(server: LiveServer) -> None:
    body = json.dumps({"model": "mine", "prompt": "a", "max_tokens": 6, "n": 4, "stream": True}).encode()
    request = b"POST /v1/completions HTTP/1.1\r\n" + HEAD + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    for index in range(40):
        with connect(server) as connection:
            connection.sendall(request[: len(request) - index % 3])
            if index % 3 == 0:
                connection.recv(100)
    idle = {"running": [], "waiting": 0}

    def is_idle() -> bool:
        status: dict[str, Any] = server.get("/v1/status", key="pt-me")[1]
        return {name: status[name] for name in idle} == idle

    server.until(is_idle, CLIENT_SECONDS + 5)
    assert is_served(server)
