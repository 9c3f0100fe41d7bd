"""How a real server starts, refuses to start, and stops.

Slow: servers start, and finish what they began.
"""

import json
import os
import signal
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest

from command_line import run
from live_server import MODEL, LiveServer, fill_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    fill_folder(folder, {"one": {}}, "drain_seconds = 60.0", {"me": "admin = true"}, positions=2048)
    return folder


@pytest.fixture
def start(folder):
    started = []

    def make(*flags, **options):
        started.append(LiveServer(folder / MODEL, folder / "prefixes", *flags, **options).wait())
        return started[-1]

    yield make
    for server in started:
        if server.process.poll() is None:
            server.process.kill()
            server.stop()


def test_sigterm_under_load_finishes_running_requests_and_accepts_no_more(start):
    server = start("--num-slots", "8")
    # So long that the first ones do not end before the last ones are there.
    tokens = 300
    body = {"model": "one", "prompt": "abc", "max_tokens": tokens, "temperature": 0, "n": 1}

    def whole(index):
        return server.post("/v1/completions", {**body, "prompt": f"text {index}"})

    def streamed(index):
        return server.post("/v1/completions", {**body, "prompt": f"text {index}", "stream": True})

    def all_are_there():
        # Those that have ended first: one that ends in between is missing, and counted the next time.
        ended = sum(each.done() for each in (*wholes, *streams))
        status = server.get("/v1/status")[1]
        return bool(status["waiting"]) and ended + len(status["running"]) + status["waiting"] == 12

    with ThreadPoolExecutor(12) as pool:
        # More than there are slots: some wait.
        wholes = [pool.submit(whole, index) for index in range(6)]
        streams = [pool.submit(streamed, index) for index in range(6)]
        server.until(all_are_there, 20)
        server.process.send_signal(signal.SIGTERM)
        server.until(lambda: server.get("/readyz")[0] == 503, 5)
        refused = whole(99)
        assert refused[0] == 503
        assert refused[1]["error"]["code"] == "draining"
        assert server.get("/healthz")[0] == 200
        answers = [each.result() for each in wholes]
        texts = [each.result() for each in streams]
    assert [answer[0] for answer in answers] == [200] * 6
    assert all(answer[1]["usage"]["completion_tokens"] == tokens for answer in answers)
    for answer, (status, text, _) in zip(answers, texts, strict=True):
        assert status == 200
        assert text.endswith("data: [DONE]\n\n")
        # On a slow machine there are comments in between.
        parts = [part for part in text.split("\n\n")[:-2] if part.startswith("data: ")]
        events = [json.loads(part[6:]) for part in parts]
        assert "".join(event["choices"][0]["text"] for event in events) == answer[1]["choices"][0]["text"]
    assert server.stop() == 0
    assert [line["event"] for line in server.lines if line["event"] != "request"] == ["started", "draining", "stopped"]
    assert "Traceback" not in "".join(server.errors)


def test_killed_during_an_upload_then_stopped_within_a_limit(start, folder):
    keyed = ("--config", str(folder / "serve.toml"))
    server, prefixes = start(*keyed), folder / "prefixes"
    file = (prefixes / "one.safetensors").read_bytes()
    host, _, port = server.url.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as half:
        head = "PUT /v1/models/half HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer pt-me\r\n"
        half.sendall(f"{head}Content-Length: {len(file)}\r\n\r\n".encode() + file[:-1])
        server.until(lambda: list(prefixes.glob(".upload.*")))
        server.stop(signal.SIGKILL)
    # As if it had been killed while it copied, too.
    (prefixes / ".half.safetensors.abc.tmp").mkdir()
    (prefixes / ".half.safetensors.abc.tmp" / ".lock").touch()
    (prefixes / ".half.safetensors.abc.tmp" / "half.safetensors").write_bytes(file[:-1])
    # Nobody takes it for a prefix, and the next start removes it.
    assert [path.name for path in prefixes.glob("*.safetensors")] == ["one.safetensors"]
    assert list(prefixes.glob(".upload.*"))

    # The environment wins over the file, and flags over both.
    environment = {"PREFIXTUNE_SERVE_DRAIN_SECONDS": "0.2", "PREFIXTUNE_SERVE_PLAYGROUND": "yes"}
    server = start(*keyed, "--no-playground", "--data-folder", str(folder / "data"), environment=environment)
    assert [path.name for path in prefixes.iterdir()] == ["one.safetensors"]
    assert server.get("/v1/models", key="pt-me")[1]["refused"] == {}
    assert server.get("/")[0] == 404
    unfinished_requests_are_cancelled_and_reported(server)


def unfinished_requests_are_cancelled_and_reported(server):
    body = {"model": MODEL, "prompt": "abc", "max_tokens": 1000, "temperature": 0, "n": 16}
    disposition = b'--x\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    rows = b'{"prompt": "a", "completion": "b"}\n' * 2**15
    form = disposition % (b"purpose", b"fine-tune") + disposition % (b'file"; filename="a.jsonl', rows)
    check = ("-P", str(server.process.pid), "-f", "prefixtune.jobs.files")
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    with ThreadPoolExecutor(3) as pool:
        # A file whose check does not end.
        pool.submit(server.request, "POST", "/v1/files", form + b"--x--", key="pt-me", headers=kind)
        server.until(lambda: subprocess.call(["pkill", "-STOP", *check]) == 0)
        stopped = int(subprocess.check_output(["pgrep", *check]))
        whole = pool.submit(server.post, "/v1/completions", body, key="pt-me")
        stream = pool.submit(server.post, "/v1/completions", {**body, "stream": True}, key="pt-me")
        server.until(lambda: len(server.get("/v1/status", key="pt-me")[1]["running"]) == 32)
        code = server.stop(signal.SIGINT)
        os.kill(stopped, signal.SIGKILL)
        assert whole.result()[0] == 503
        assert whole.result()[1]["error"]["code"] == "draining"
        last = stream.result()[1].strip().split("\n\n")[-1]
        assert json.loads(last[6:])["error"]["code"] == "draining"
    assert code == 0
    assert "gave_up" in [line["event"] for line in server.lines]


def test_it_does_not_start_without_its_folder_or_port(folder):
    missing = ("--prefixes", str(folder / "none"), "--prefill-tokens", "8")
    assert "the folder of prefixes" in run("serve", *missing, code=2)[1]
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        # Before the model is looked for.
        wrong = ("--backbone", "no/such-model", "--prefixes", str(folder / "prefixes"), "--port", port)
        error = run("serve", *wrong, code=2)[1]
    assert f"cannot listen on 127.0.0.1 port {port}" in error
