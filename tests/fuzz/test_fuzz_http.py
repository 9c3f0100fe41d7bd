"""A real server against what a fuzzer makes up: byte by byte, on this machine only.

    make fuzz

PREFIXTUNE_FUZZ_SECONDS (600) is the time of all fuzzing, half of it this file's; PREFIXTUNE_FUZZ_SEED (a new one each
time, and printed) makes a run again.
"""

import contextlib
import json
import os
import random
import socket
import time

import pytest

from live_server import MODEL, fill_folder, serve

SECONDS = float(os.environ.get("PREFIXTUNE_FUZZ_SECONDS", "600")) / 2
SEED = int(os.environ.get("PREFIXTUNE_FUZZ_SEED", "0")) or random.SystemRandom().randrange(1, 2**31)
MOST = 100_000
"""Requests of one kind, however much time there is."""
KEY = "pt-fuzz"
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}: {food}"}
TASKS = {"mine": "records", "spare": "records", "pubs": "e2e", "facts": "webnlg", "doc": "summarization"}
ATTACKS = []


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    plain = {key: FORMAT[key] for key in ("prompt", "target")}
    prefixes = {
        name: {"task": task, "text_format": FORMAT if task == "records" else plain} for name, task in TASKS.items()
    }
    settings = "max_tokens = 4\ndefault_max_tokens = 4\nmax_texts = 4"
    fill_folder(folder, prefixes, settings, {"fuzz": "admin = true"})
    print(f"PREFIXTUNE_FUZZ_SEED={SEED}")
    server = serve(folder)
    yield server
    assert server.stop() == 0
    errors = [line for line in server.lines if line["level"] == "error"]
    assert not errors, errors[0].get("traceback")
    assert "Traceback" not in "".join(server.errors)


# --- byte by byte -----------------------------------------------------------------------------------------------------


def attack(make):
    """Add a kind of attack: one call is one connection."""
    ATTACKS.append(make)
    return make


def head(method, path, *headers):
    """The lines of a request's header; after the answer the server ends the connection."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", f"Authorization: Bearer {KEY}", "Connection: close"]
    return "\r\n".join([*lines, *(f"{name}: {value}" for name, value in headers), "", ""]).encode("utf-8")


def say(server, *pieces, pause=0.0, answer=True):
    """Send pieces over one connection, and hear what comes of it; whatever the server says, it is no 5xx."""
    host, _, port = server.url.removeprefix("http://").partition(":")
    reported = b""
    with contextlib.suppress(ConnectionError), socket.create_connection((host, int(port)), timeout=10) as connection:
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(pause)
        if answer:
            while piece := connection.recv(65536):
                reported += piece
    for line in reported.split(b"HTTP/1.1 ")[1:]:
        assert line[:1] != b"5", (reported[:1000], b"".join(pieces)[:1000])
    return reported


def some_json(random, depth=0):
    """A value of any kind, with a taste for edges."""
    kind = random.randrange(9 if depth < 4 else 6)
    if kind == 0:
        return random.choice([None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, -1e-320])
    if kind == 1:
        return random.randint(-5, 400)
    if kind == 2:
        return "".join(
            chr(random.choice([random.randrange(128), random.randrange(0x2FFF)])) for _ in range(random.randrange(40))
        )
    if kind == 3:
        return random.choice(
            ["", " ", "\n" * random.randrange(1, 5000), "\0", "{source}", "name[a], food[b]", "é" * 300]
        )
    if kind in (4, 5):
        return random.choice([*TASKS, MODEL, "user", "system", "stop", "text", "json_object"])
    if kind == 6:
        return {random.choice(FIELDS): some_json(random, depth + 1) for _ in range(random.randrange(4))}
    return [some_json(random, depth + 1) for _ in range(random.randrange(4))]


FIELDS = (
    *("model", "prompt", "messages", "role", "content", "type", "text", "n", "max_tokens", "min_tokens", "temperature"),
    *("top_p", "top_k", "repetition_penalty", "seed", "stop", "logprobs", "top_logprobs", "stream", "stream_options"),
    *("include_usage", "echo", "tools", "response_format", "source", "fields", "format_of", "name", "food", "mr"),
    *("triples", "document", "suffix", "user", "metadata", "logit_bias", "max_completion_tokens", "x"),
    *("min_p", "presence_penalty", "frequency_penalty", "json_schema", "schema", "strict", "input", "labels"),
)
BODIES = {
    "/v1/completions": {"model": "mine", "prompt": "a"},
    "/v1/chat/completions": {"model": "pubs", "messages": [{"role": "user", "content": "name[a]"}]},
    "/classify": {"model": MODEL, "input": "a", "labels": ["a", "b"]},
    "/v1/tasks/mine": {"name": "a", "food": "b"},
    "/v1/tasks/pubs": {"mr": "name[a]"},
    "/v1/tasks/facts": {"triples": [["a", "b", "c"]]},
    "/v1/tasks/doc": {"document": "a"},
    f"/v1/tasks/{MODEL}": {"source": "a", "format_of": "pubs"},
}


def body_of(random, path):
    value = dict(BODIES[path])
    for _ in range(random.randrange(3)):
        value[random.choice(FIELDS)] = some_json(random)
    if random.random() < 0.1:
        value.pop(random.choice(list(value)))
    text = json.dumps(value, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if random.random() < 0.2:
        # Numbers and nesting that `json.dumps` does not write.
        odd = [b"1e999", b"-1e999", b"NaN", b"9" * random.choice([30, 5000]), b"[" * 2000 + b"]" * 2000, b'"\\ud800"']
        text = text[:-1] + b', "%s": %s}' % (random.choice(FIELDS).encode(), random.choice(odd))
    return text


@attack
def bodies(random, server):
    path = random.choice(list(BODIES))
    data = bytearray(body_of(random, path))
    for _ in range(random.choice([0, 0, 1, 5])):
        data[random.randrange(len(data))] = random.randrange(256)
    kind = random.choice(["application/json"] * 8 + ["text/plain", "application/json; charset=latin-1", ""])
    say(server, head("POST", path, ("Content-Type", kind), ("Content-Length", str(len(data)))) + data)


METHODS = (
    *("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND", "get", "G\0T", ""),
)
PARTS = (
    *("v1", "models", "tasks", "completions", "admin", "prefixes", "healthz", "readyz", "metrics", "openapi.json"),
    *("status", "mine", ".", "..", "%2e%2e", "%00", "%ff", "%", "*", "#", "é", "", "a" * 500, "?x=" + "y" * 100),
)
NAMES = (
    *("Expect", "Connection", "Upgrade", "Transfer-Encoding", "Content-Length", "Content-Type", "X-Request-Id", "Host"),
    *("X-Forwarded-For", "Authorization", "Origin", "Cookie", "Range", "Accept-Encoding", "TE", "Trailer", "Via"),
)
VALUES = (
    *("100-continue", "close", "websocket", "h2c", "chunked", "gzip", "0", "-1", "1, 1", "bytes=0-", "\t", "é"),
    *("http://evil.example", "Bearer", "Bearer " + "x" * 2000, "Basic eA==", "application/json", "a" * 3000),
)


@attack
def methods_paths_and_headers(random, server):
    method = random.choice([*METHODS, "X" * 300])
    path = random.choice(["/", "", "http://localhost/", "//", "*"]) + "/".join(
        random.choices(PARTS, k=random.randrange(5))
    )
    headers = [(random.choice(NAMES), random.choice(VALUES)) for _ in range(random.randrange(5))]
    say(server, head(method, path, *headers) + b"{}")


@attack
def broken_off(random, server):
    path = random.choice(list(BODIES))
    data = json.dumps({**BODIES[path], "stream": random.random() < 0.7, "max_tokens": 4}).encode()
    whole = head("POST", path, ("Content-Type", "application/json"), ("Content-Length", str(len(data)))) + data
    cut = random.choice([len(whole), random.randrange(1, len(whole))])
    say(server, whole[:cut], pause=random.choice([0, 0, 0.005, 0.05]), answer=False)


@attack
def uploads(random, server):
    lengths = [0, 2, 10, 2**18 + 1, 2**40, 2**64 - 1]
    stored = [
        "{}",
        '{"a":1e999}',
        '{"prefix_length":{"decoder":1e999}}',
        '{"task":' + "[" * 3000 + "]" * 3000 + "}",
        "[",
    ]
    headers = [json.dumps({"__metadata__": {"prefixtune": each}}) for each in stored]
    headers += ["{}", "[" * 5000, '{"a":' * 2000, '{"a":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}']
    text = random.choice(headers).encode()
    length = random.choice([len(text)] * 3 + lengths)
    data = length.to_bytes(8, "little") + text + random.randbytes(random.randrange(100))
    name = random.choice(["spare", "new", "..", "%2e%2e%2fx", "a" * 200, "a%00b", "\u00e9", MODEL])
    reported = random.choice([len(data)] * 4 + [len(data) + 1, 2**40])
    answer = say(
        server,
        head("PUT", f"/v1/models/{name}", ("Content-Length", str(reported))) + data,
    )
    assert b"HTTP/1.1 20" not in answer


@pytest.mark.parametrize("kind", ATTACKS, ids=lambda kind: kind.__name__)
def test_no_bytes_are_a_fault_of_the_server(server, kind):
    made = random.Random(f"{SEED} {kind.__name__}")
    end, count = time.monotonic() + SECONDS / len(ATTACKS), 0
    while time.monotonic() < end and count < MOST:
        kind(made, server)
        count += 1
        if count % 50 == 0:
            begun = time.monotonic()
            assert server.get("/healthz")[0] == 200
            assert time.monotonic() - begun < 5
    assert count
    print(f"{kind.__name__}: {count:,} connections")
    body = {"model": "mine", "prompt": "a", "max_tokens": 2, "temperature": 0}
    assert server.post("/v1/completions", body, key=KEY)[0] == 200

    def is_idle():
        reported = server.get("/v1/status", key=KEY)[1]
        return not reported["running"] and not reported["waiting"]

    server.until(is_idle, 10)
