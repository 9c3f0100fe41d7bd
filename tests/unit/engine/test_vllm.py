"""The engine vLLM against a stand-in for its server: what is asked, what fails, and what a lost server does."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from command_line import run as run_command
from engine_runs import submit
from live_server import make_model, make_prefix
from prefixtune.backbone.prefixes import make_header
from prefixtune.backbone.shapes import load_shapes
from prefixtune.engine.remote_server import RemoteServer
from prefixtune.engine.request import EngineFull, Request, SamplingParams
from prefixtune.engine.vllm import VllmConfig, VllmEngine
from prefixtune.errors import BackboneError, ConfigError, ContextLengthError, PrefixWarning, RequestError
from prefixtune.inference.generate import generate
from prefixtune.prefix.folder import PrefixReference, path_of
from prefixtune.prefix.prefix import read_artifact

NEW = 6


@dataclass
class FakeServer:
    """Writes the same tokens behind any prompt; a request whose prefix is no file of the folder fails.

    Attributes:
        folder: Of the prefixes; None: it has no connector.
        ids: The tokens that it writes.
        bodies: What it was asked for.
        pause: Seconds between tokens.
        cached: Positions of a prefix that it says it did not compute; None: it does not say.
        error: Sent in place of the third token.
        reason: Why it ends with each token.
        slow: Seconds until it says how it is.
    """

    folder: Path | None
    ids: list[int]
    bodies: list[dict[str, Any]] = field(default_factory=list)
    pause: float = 0.0
    cached: int | None = None
    error: str = ""
    reason: str | None = None
    slow: float = 0.0

    def __post_init__(self):
        self.start()

    def start(self, port=0):
        """Listen."""
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.0"

            def log_message(self, *_):
                """Nothing."""

            def do_GET(self):
                model = {"id": "served", "max_model_len": 64}
                time.sleep(fake.slow)
                self.reply(200, {"data": [model]} if self.path.startswith("/v1") else {})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                reference = PrefixReference.of_request(body.get("kv_transfer_params"), body.get("cache_salt"))
                if reference is not None and fake.folder is not None:
                    path = path_of(fake.folder, reference.name)
                    if reference.fault or not path.exists() or PrefixReference.of_file(path) != reference:
                        self.reply(500, {"error": {"message": "Internal server error"}})
                        return
                if not body.get("stream"):
                    self.reply(200, {"choices": []})
                    return
                fake.bodies.append(body)
                self.send_response(200)
                self.end_headers()
                for token in range(body["max_tokens"]):
                    time.sleep(fake.pause)
                    # Its text has line breaks that are none of the stream's.
                    choice = {"token_ids": [fake.ids[token]], "finish_reason": fake.reason, "text": "\u2028\x85"}
                    if fake.error and token == 2:
                        self.event({"error": {"message": fake.error}})
                        return
                    self.event({"choices": [choice]})
                details = None if fake.cached is None else {"cached_tokens": fake.cached}
                self.event({"choices": [], "usage": {"prompt_tokens_details": details}})

            def event(self, content):
                self.wfile.write(b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n")

            def reply(self, status, content):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(content).encode())

        self.server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.server.daemon_threads = True
        # A client that goes away is no news.
        self.server.handle_error = lambda *_: None
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server.server_port}"

    def stop(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(tmp_path, backbone):
    fake = FakeServer(tmp_path, backbone.encode("abcdefghijklmnopqrstuvwxyz" * 3))
    yield fake
    fake.stop()


@pytest.fixture(scope="module")
def backbone(tiny_backbone):
    return tiny_backbone("llama")


@pytest.fixture
def engine(fake, backbone, tmp_path):
    with VllmEngine(backbone, VllmConfig(url=fake.url, folder=str(tmp_path), num_slots=2)) as engine:
        yield engine


def ask(engine, prefix=None, **sampling):
    return submit(engine, [Request((5, 6), prefix, SamplingParams(**{"max_new_tokens": NEW, **sampling}))])[0][0]


def test_a_prefix_is_a_file_by_its_hash_and_placeholders(engine, fake, backbone, random_prefix, tmp_path):
    prefix = random_prefix(backbone, 3)
    for _ in range(2):
        assert ask(engine, prefix).text == "abcdef"
    assert len(list(tmp_path.glob("*.safetensors"))) == 2, "the probe's and this one"
    assert ask(engine, random_prefix(backbone, 3, seed=1)).finish_reason == "length"
    assert ask(engine).finish_reason == "length"
    first, again, other, bare = fake.bodies
    assert first["prompt"][3:] == [5, 6]
    assert first["kv_transfer_params"] == again["kv_transfer_params"] != other["kv_transfer_params"]
    assert len({first["cache_salt"], again["cache_salt"], other["cache_salt"]}) == 2
    assert bare["prompt"] == [5, 6]
    assert not {"kv_transfer_params", "cache_salt"} & bare.keys()
    # A file that is gone is written again.
    for path in tmp_path.glob("*.safetensors"):
        path.unlink()
    assert ask(engine, prefix).text == "abcdef"
    engine.close()
    assert not list(tmp_path.iterdir())


def test_what_is_asked(engine, fake, backbone):
    found = ask(
        engine,
        temperature=0.5,
        seed=1,
        min_new_tokens=2,
        banned=(9,),
        logit_bias={8: 2.0},
        end_ids=tuple(backbone.encode("e")),
    )
    assert (found.text, found.finish_reason) == ("abcd", "stop")
    (body,) = fake.bodies
    assert body["model"] == "served"
    assert body["logit_bias"] == {"8": 2.0, "9": -100.0}
    assert body["stop_token_ids"] == sorted({backbone.eos_id, *backbone.encode("e")})
    assert (body["temperature"], body["min_tokens"], body["ignore_eos"]) == (0.5, 2, True)
    assert 0 <= body["seed"] < 2**32
    assert ask(engine, stop=("cd",)).text == "ab"


def test_what_cannot_be_asked(engine):
    for sampling, error in (({"prompt_logprobs": 1}, RequestError), ({"max_new_tokens": 63}, ContextLengthError)):
        with pytest.raises(error):
            ask(engine, **sampling)
    assert engine.num_unfinished == 0


def test_failures_of_one_text(engine, fake, backbone, random_prefix):
    fake.error = "KV load failed"
    found = ask(engine)
    assert (found.finish_reason, found.engine_crashed) == ("error", False)
    # As when it is told to end.
    fake.error, fake.reason = "", "abort"
    assert ask(engine).finish_reason == "error"
    # It computed the placeholders.
    fake.reason, fake.cached = None, 2
    assert ask(engine, random_prefix(backbone, 3)).finish_reason == "error"
    fake.cached, fake.pause = None, 0.2
    began = time.monotonic()
    long = SamplingParams(max_new_tokens=50)
    assert submit(engine, [Request((5,), None, long)], deadline=0.3)[0][0].finish_reason == "timeout"
    assert time.monotonic() - began < 5
    assert engine.healthy


def test_one_that_nobody_waits_for_is_cancelled_even_before_its_first_token(engine, fake):
    fake.pause = 30.0
    reasons = {}
    requests = [Request((5,), None, SamplingParams(max_new_tokens=2)) for _ in range(3)]
    for request in requests:
        engine.submit(request, lambda output: reasons.update({output.request_id: output.finish_reason}))
    while engine.snapshot().waiting != 1:
        time.sleep(0.01)
    for request in requests:
        engine.cancel(request.id)
    end = time.monotonic() + 10
    while engine.num_unfinished and time.monotonic() < end:
        time.sleep(0.02)
    assert set(reasons.values()) == {"cancelled"}


def test_a_server_that_goes_away_and_comes_back(engine, fake):
    port = fake.server.server_port
    fake.stop()
    end = time.monotonic() + 20
    while engine.healthy and time.monotonic() < end:
        time.sleep(0.05)
    with pytest.raises(EngineFull):
        ask(engine)
    fake.start(port)
    while not engine.healthy and time.monotonic() < end:
        time.sleep(0.05)
    assert ask(engine).text == "abcdef"
    assert not engine.failed


def test_one_that_comes_back_without_the_connector_is_tried_without_leaving_files(engine, fake, tmp_path, caplog):
    port = fake.server.server_port
    fake.stop()
    fake.folder = None
    fake.start(port)
    engine._loop.call_soon_threadsafe(setattr, engine._server, "_is_up", False)
    end = time.monotonic() + 20
    while engine.restarts < 3 and time.monotonic() < end:
        time.sleep(0.05)
    assert (engine.restarts >= 3, engine.healthy) == (True, False)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert len(caplog.records) == 2, "that it has ended, and why it is not taken"


def test_one_look_that_fails_ends_no_text(engine, fake, monkeypatch):
    monkeypatch.setattr("prefixtune.engine.remote_server._LOOK_EVERY", 0.0)
    answers, looks = RemoteServer._answers, []

    async def fail_twice(server, **options):
        looks.append(1)
        return len(looks) > 2 and await answers(server, **options)

    monkeypatch.setattr(RemoteServer, "_answers", fail_twice)
    fake.pause = 0.3
    assert ask(engine).text == "abcdef"
    assert (len(looks) > 2, engine.restarts) == (True, 0)


def test_an_unforeseen_error_fails_the_engine_for_good(engine, monkeypatch):
    async def broken(server):
        raise RuntimeError("unforeseen")

    failed = threading.Event()
    engine.on_failure = failed.set
    monkeypatch.setattr(RemoteServer, "look", broken)
    assert failed.wait(10)
    assert (engine.failed, engine.healthy) == (True, False)
    with pytest.raises(EngineFull):
        ask(engine)


def test_a_child_that_hangs_at_its_start_is_given_up(backbone, python, monkeypatch):
    monkeypatch.setattr("prefixtune.engine.remote_server._START_SECONDS", 1.0)
    python.write_text("#!/bin/sh\nexec cat\n")
    with pytest.raises(BackboneError):
        VllmEngine(backbone, VllmConfig(python=str(python)))


def test_a_file_that_is_being_written_stops_nobody_else(engine, fake, backbone, random_prefix, monkeypatch):
    slow, quick = random_prefix(backbone, 3), random_prefix(backbone, 4)
    go_on, write = threading.Event(), engine._files._write

    def write_slowly(path, prefix):
        assert prefix is not slow or go_on.wait(20)
        return write(path, prefix)

    monkeypatch.setattr(engine._files, "_write", write_slowly)
    waiting = threading.Thread(target=ask, args=(engine, slow))
    waiting.start()
    try:
        for prefix in (quick, None):
            assert ask(engine, prefix).text == "abcdef"
    finally:
        go_on.set()
        waiting.join()


def test_a_file_is_no_larger_than_what_is_served(engine, backbone, random_prefix):
    prefix = random_prefix(backbone, 3).to(torch.bfloat16)
    file = engine._files.take(prefix)
    assert read_artifact(file.path).dtype == torch.bfloat16


def test_a_request_that_cannot_be_made_leaves_its_id_free(engine, monkeypatch):
    request = Request((5, 6), None, SamplingParams(max_new_tokens=NEW))
    with monkeypatch.context() as patch:
        patch.setattr(Request, "detokenizer", None)
        with pytest.raises(TypeError):
            engine.submit(request, print)
    assert engine.num_unfinished == 0
    assert submit(engine, [request])[0][0].text == "abcdef"


def test_a_busy_server_is_no_dead_one(engine, fake, monkeypatch):
    monkeypatch.setattr("prefixtune.engine.remote_server._LOOK_SECONDS", 0.1)
    fake.slow, fake.pause = 0.3, 0.3
    assert ask(engine).text == "abcdef"
    assert engine.restarts == 0


def test_a_long_source_is_cut_to_the_engines_positions(engine, fake, backbone, random_prefix):
    text_format = {"prompt": "{source}", "target": "{target}", "on_too_long": "cut"}
    prefix = random_prefix(backbone, 3, header=make_header(backbone, text_format=text_format))
    assert backbone.max_positions > 64
    with pytest.warns(PrefixWarning):
        generate(backbone, ["ab " * 30], prefix, max_new_tokens=NEW, engine=engine)
    assert len(fake.bodies[0]["prompt"]) == 64 - NEW


def test_a_server_without_the_connector_or_the_folder_is_refused(fake, backbone, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for folder, reads, error in (
        (tmp_path, None, BackboneError),
        (tmp_path / "elsewhere", tmp_path, BackboneError),
        (tmp_path / "none", tmp_path, ConfigError),
    ):
        fake.folder = reads
        with pytest.raises(error):
            VllmEngine(backbone, VllmConfig(url=fake.url, folder=str(folder)))
    url = fake.url
    fake.stop()
    with pytest.raises(BackboneError):
        VllmEngine(backbone, VllmConfig(url=url, folder=str(tmp_path)))
    fake.start()
    for wrong in ("http://gpu:port", "http://[::1"):
        with pytest.raises(BackboneError):
            VllmEngine(backbone, VllmConfig(url=wrong, folder=str(tmp_path)))


_CHILD = """#!{python}
import http.server, json, os, socketserver, sys, threading
option = lambda name: sys.argv[sys.argv.index(name) + 1]
folder = json.loads(option("--kv-transfer-config"))["kv_connector_extra_config"]["prefixes"]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{{"data": [{{"id": "served", "max_model_len": 256}}]}}')
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        prefix = (body.get("kv_transfer_params") or {{"prefixtune": None}})["prefixtune"]
        length = prefix["length"] if prefix else 0
        said = [token for token in body["prompt"][length:] if token not in body["stop_token_ids"]]
        if prefix and os.path.exists(f"{{folder}}/{{prefix['name']}}.safetensors"):
            said *= 2
        self.send_response(200)
        self.end_headers()
        choices = [[{{"token_ids": [token]}}] for token in said[: body["max_tokens"]]]
        choices[-1][0]["finish_reason"] = "stop"
        for event in [*({{"choices": one}} for one in choices), {{"choices": [], "usage": {{}}}}]:
            self.wfile.write(b"data: " + json.dumps(event).encode() + b"\\n\\n")
    def address_string(self): return ""
    def log_message(self, *_): pass
server = socketserver.ThreadingUnixStreamServer(option("--uds"), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
sys.stdin.read()
"""
"""In place of a Python with vLLM: says what it reads without the placeholders, and twice with a prefix."""


@pytest.fixture
def python(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    python = tmp_path / "python"
    python.write_text(_CHILD.format(python=sys.executable))
    python.chmod(0o755)
    return python


def test_only_its_user_can_reach_a_child(backbone, python, tmp_path):
    with VllmEngine(backbone, VllmConfig("tiny", python=str(python))) as engine:
        (path,) = tmp_path.glob("prefixtune-*/*")
        assert path.is_socket()
        assert not path.parent.stat().st_mode & 0o077
        assert (engine.healthy, engine.max_length) == (True, 256)
    assert not path.parent.exists()


def test_a_conversation_in_the_terminal(python, tmp_path):
    """`prefixtune chat --engine vllm`: the whole conversation is read, with the prefix in use."""
    model = make_model(tmp_path / "model")
    prefix = make_prefix(load_shapes(str(model)), tmp_path / "mine.safetensors", 1)
    options = ("--engine", "vllm", "--vllm-python", str(python), "--backbone", str(model), "--prefix", str(prefix))
    lines = "a\n/prefix none\nb\n"
    out, _ = run_command("chat", *options, "--max-new-tokens", "100", "--json", stdin=lines)
    rows = [json.loads(line) for line in out.splitlines()]
    first = "[user]a[assistant]"
    assert [row["prefix"] for row in rows] == ["mine", None]
    assert [row["output"] for row in rows] == [2 * first, f"{first}{2 * first}[user]b[assistant]"]
    assert not list(tmp_path.glob("prefixtune-*")), "the child's socket"
    assert not list((tmp_path / "home" / "engines").iterdir()), "the prefixes"


def test_a_python_without_vllm_is_refused(backbone, tmp_path, monkeypatch):
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 20)))
    Path(tempfile.gettempdir()).mkdir()
    with pytest.raises(BackboneError, match="TMPDIR"):
        VllmEngine(backbone, VllmConfig("tiny"))
    monkeypatch.undo()
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path))
    with pytest.raises(BackboneError):
        VllmEngine(backbone, VllmConfig("tiny"))
    assert not list((tmp_path / "engines").iterdir())
