"""`prefixtune jobs` against a server that the test scripts: what is sent, what is shown, and every way to fail."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from command_line import run

JOB = {
    "id": "ftjob-0123456789abcdef01234567",
    "object": "fine_tuning.job",
    "created_at": 1_780_000_000,
    "model": "tiny",
    "status": "running",
    "fine_tuned_model": None,
    "training_file": "file-0123456789abcdef01234567",
    "prefixtune": {"name": "cats", "progress": {"step": 1, "total_steps": 4}},
}
FILE = {
    "id": "file-0123456789abcdef01234567",
    "object": "file",
    "bytes": 12,
    "created_at": 1_780_000_000,
    "filename": "rows.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}
DONE = {**JOB, "status": "succeeded", "fine_tuned_model": "cats"}
EVENTS = [
    {"id": "ftevent-1", "created_at": 1, "level": "info", "message": "it begins", "type": "message", "data": {}},
    *(
        {
            "id": f"ftevent-{step}",
            "created_at": step,
            "level": "info",
            "message": f"step {step}",
            "type": "metrics",
            "data": {"step": step, "total_steps": 4, "train_loss": 1 / step},
        }
        for step in (2, 3)
    ),
]

Answer = tuple[int, dict[str, str], bytes]


def as_json(value: object, status: int = 200, **headers: str) -> Answer:
    shown = {name.replace("_", "-"): text for name, text in headers.items()}
    return status, {"Content-Type": "application/json", **shown}, json.dumps(value).encode()


def as_error(status: int, message: str, **headers: str) -> Answer:
    return as_json({"error": {"message": message, "type": "x", "param": None, "code": None}}, status, **headers)


def as_stream(events: list[dict[str, Any]], end: str = "data: [DONE]\n\n") -> Answer:
    text = "".join(f": a comment\n\ndata: {json.dumps(event)}\n\n" for event in events) + end
    return 200, {"Content-Type": "text/event-stream; charset=utf-8"}, text.encode()


class FakeServer:
    """Answers in the order that a test gives, and keeps what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, dict[str, str], bytes]] = []
        self.answers: dict[str, list[Answer]] = {}
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                outer.asked.append((self.command, self.path, dict(self.headers.items()), body))
                scripted = outer.answers[f"{self.command} {self.path.partition('?')[0]}"]
                status, headers, content = scripted.pop(0) if len(scripted) > 1 else scripted[0]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if "Content-Length" not in headers:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
                if int(headers.get("Content-Length", 0)) > len(content):
                    self.close_connection = True

            do_GET = do_POST = do_DELETE = answer

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def on(self, request: str, *answers: Answer) -> None:
        method, path = request.split()
        self.answers[f"{method} /v1{path}"] = list(answers)

    def sent(self, request: str) -> list[Any]:
        method, path = request.split()
        return [body for asked, where, _, body in self.asked if (asked, where) == (method, f"/v1{path}")]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeServer]:
    for name in ("PREFIXTUNE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("prefixtune.cli.api_client._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("prefixtune.cli.training_client._PAUSE", 0.01)
    server = FakeServer()
    server.on("GET /fine_tuning/jobs", as_json({"object": "list", "data": [DONE, JOB], "has_more": False}))
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_json(DONE))
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", as_stream(EVENTS))
    server.on("GET /models", as_json({"data": [{"id": "cats", "parent": "tiny"}, {"id": "tiny", "parent": None}]}))
    server.on("POST /files", as_json(FILE))
    server.on("POST /fine_tuning/jobs", as_json(JOB))
    yield server
    server.close()


@pytest.fixture
def jobs(server: FakeServer) -> Callable[..., tuple[str, str]]:
    return lambda *words, **options: run("jobs", *words, "--url", server.url, **options)


Jobs = Callable[..., tuple[str, str]]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


def test_lists_jobs_with_their_names(jobs: Jobs) -> None:
    out, _ = jobs()
    head, first, second = out.splitlines()
    assert head.split() == ["job", "status", "name", "model", "created"]
    assert first.split()[:4] == [JOB["id"], "succeeded", "cats", "tiny"]
    assert second.split()[:6] == [JOB["id"], "running,", "25", "%", "cats", "tiny"]
    assert json.loads(jobs("list", "--json")[0])["jobs"][0]["fine_tuned_model"] == "cats"


def test_lists_by_pages(jobs: Jobs, server: FakeServer) -> None:
    page = as_json({"data": [JOB] * 2, "has_more": True})
    server.on("GET /fine_tuning/jobs", page)
    assert len(jobs("--limit", "5")[0].splitlines()) == 6
    assert [path.partition("?")[2] for _, path, _, _ in server.asked] == [
        "limit=5",
        f"limit=3&after={JOB['id']}",
        f"limit=1&after={JOB['id']}",
    ]


def test_create_uploads_and_asks(jobs: Jobs, server: FakeServer, rows: Path) -> None:
    out, _ = jobs("create", str(rows), "--name", "cats", "--epochs", "3", "--seed", "1", "--option", "prefix_length=4")
    (form,) = server.sent("POST /files")
    assert rows.read_bytes() in form
    assert b'name="purpose"\r\n\r\nfine-tune\r\n' in form
    assert b'filename="rows.jsonl"' in form
    (body,) = server.sent("POST /fine_tuning/jobs")
    assert json.loads(body) == {
        "model": "tiny",
        "training_file": FILE["id"],
        "seed": 1,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        "prefixtune": {"name": "cats", "prefix_length": 4},
    }
    assert JOB["id"] in out


def test_a_refused_job_need_not_upload_its_file_again(jobs: Jobs, server: FakeServer, rows: Path) -> None:
    server.on("POST /fine_tuning/jobs", as_error(400, "the name 'cats' is taken."))
    _, err = jobs("create", str(rows), "--name", "cats", code=2)
    assert f"uploaded as {FILE['id']}" in err
    assert "is taken" in err
    jobs("create", FILE["id"], "--name", "cats", code=2)
    assert len(server.sent("POST /files")) == 1


def test_a_file_that_cannot_be_trained_on_makes_no_job(jobs: Jobs, server: FakeServer, rows: Path) -> None:
    server.on("POST /files", as_json({**FILE, "status": "error", "status_details": "line 7 is\x1b[2J wrong."}))
    _, err = jobs("create", str(rows), code=2)
    assert "rows.jsonl cannot be trained on: line 7 is\ufffd[2J wrong." in " ".join(err.split())
    assert f"jobs delete {FILE['id']}" in " ".join(err.split())
    assert not server.sent("POST /fine_tuning/jobs")


def test_a_document_and_its_questions(jobs: Jobs, server: FakeServer, rows: Path) -> None:
    jobs("create", str(rows), "--document", "--questions", "self", "--model", "tiny", "--validation", FILE["id"])
    assert b"\r\n\r\ndocument\r\n" in server.sent("POST /files")[0]
    body = json.loads(server.sent("POST /fine_tuning/jobs")[0])
    assert body["prefixtune"] == {"questions": "self"}
    assert body["validation_file"] == FILE["id"]
    assert not server.sent("GET /models")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["create"], "needs a file"),
        (["show"], "needs the id of a job"),
        (["list", "x"], "unexpected argument 'x'"),
        (["create", "{rows}", "--validation", "gone.jsonl"], "there is no file 'gone.jsonl'"),
        (["create", "{rows}", "--validation", "self"], "there is no file 'self'"),
        (["create", "self"], "there is no file 'self'"),
        (["create", "{rows}", "--option", "length"], "--option is 'length', but must be NAME=VALUE"),
        (["create", "{rows}", "--epochs", "two"], "--epochs is 'two', but must be a number or auto"),
        (
            ["create", "{rows}", "--learning-rate-multiplier", "nan"],
            "multiplier is 'nan', but must be a number or auto",
        ),
        (
            ["create", "{rows}", "--learning-rate-multiplier", "inf"],
            "multiplier is 'inf', but must be a number or auto",
        ),
        (["show", ".."], "names nothing"),
        (["--key", "a\nb"], "characters that no key has"),
    ],
)
def test_mistakes_are_seen_before_anything_is_sent(
    words: list[str], message: str, jobs: Jobs, server: FakeServer, rows: Path
) -> None:
    _, err = jobs(*[word.format(rows=rows) for word in words], code=2)
    assert message in err
    assert err.count("\n") <= 2
    assert server.asked == []


@pytest.mark.parametrize("url", ["ftp://here/v1", "here:8000", "http://me:secret@here/v1", "http://here/v1?key=1", ""])
def test_an_address_that_is_none(url: str) -> None:
    _, err = run("jobs", "--url", url, code=2)
    assert "must be an address of http or https" in err


def test_follow_shows_events_and_ends_with_the_name(jobs: Jobs) -> None:
    out, err = jobs("follow", JOB["id"])
    assert out == "cats\n"
    assert "it begins" in err
    assert re.search(r"training: 3/4 \(75 %\), loss 0\.3333", err)
    lines = [json.loads(line) for line in jobs("follow", JOB["id"], "--json")[0].splitlines()]
    assert [line["id"] for line in lines] == ["ftevent-1", "ftevent-2", "ftevent-3", JOB["id"]]


def test_follow_goes_on_where_a_stream_broke_off(jobs: Jobs, server: FakeServer) -> None:
    status, headers, content = as_stream(EVENTS[:2], end="")
    broken = status, {**headers, "Content-Length": str(len(content) + 10)}, content
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", broken, as_stream(EVENTS[2:]))
    # It is being started again: asked until it answers.
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_error(503, "starting", Retry_After="0"), as_json(DONE))
    out, err = jobs("follow", JOB["id"], "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()][:3] == [event["id"] for event in EVENTS]
    assert err == ""
    assert server.sent(f"GET /fine_tuning/jobs/{JOB['id']}/events?stream=true&after=ftevent-2") == [b""]


@pytest.mark.parametrize("status", ["failed", "cancelled", "paused"])
def test_follow_says_what_became_of_it(status: str, jobs: Jobs, server: FakeServer) -> None:
    error = {"code": "c", "message": "row 7\x1b[2J is wrong"} if status == "failed" else None
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_json({**JOB, "status": status, "error": error}))
    out, err = jobs("follow", JOB["id"], code=1)
    assert out == ""
    assert f"{JOB['id']} is {status}" in err
    assert ("row 7\ufffd[2J is wrong" in err) == (status == "failed")
    assert ("jobs resume" in err) == (status == "paused")


def test_an_interruption_leaves_the_job_running(
    jobs: Jobs, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prefixtune.cli.training_client.TrainingClient.follow", interrupted)
    _, err = jobs("follow", JOB["id"], code=130)
    assert f"the job goes on; `prefixtune jobs follow {JOB['id']} --url {server.url}` follows it again" in err
    assert server.asked == []


@pytest.mark.parametrize("action", ["cancel", "pause", "resume"])
def test_changes_a_job(action: str, jobs: Jobs, server: FakeServer) -> None:
    server.on(f"POST /fine_tuning/jobs/{JOB['id']}/{action}", as_json({**JOB, "status": "queued"}))
    assert json.loads(jobs(action, JOB["id"], "--json")[0])["status"] == "queued"


def test_deletes_results_and_files(jobs: Jobs, server: FakeServer) -> None:
    server.on("DELETE /models/cats%2Bdogs", as_json({"id": "cats+dogs", "deleted": True}))
    server.on(f"DELETE /files/{FILE['id']}", as_json({"id": FILE["id"], "deleted": True}))
    assert "cats+dogs is deleted" in jobs("delete", "cats+dogs")[1]
    assert json.loads(jobs("delete", FILE["id"], "--json")[0]) == {"id": FILE["id"], "deleted": True}


def test_an_upload_that_cannot_be_trained_on(jobs: Jobs, server: FakeServer, rows: Path) -> None:
    server.on("POST /files", as_json({**FILE, "status": "error", "status_details": "row 7,001 has no answer"}))
    out, err = jobs("upload", str(rows), code=1)
    assert out == f"{FILE['id']}\n"
    assert "error: it cannot be trained on: row 7,001 has no answer" in err


# --- what a server may do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (as_error(404, "there is\nno job"), "error: there is no job\n"),
        (as_error(401, "no key"), "hint: give a key with --key, or in the variable PREFIXTUNE_API_KEY."),
        (as_error(429, "too many", Retry_After="600"), "hint: try again in 600 s."),
        ((500, {}, b"<html>"), "answers with the status 500, and no error of OpenAI's interface"),
        (as_json([]), "answers in a shape that OpenAI's interface does not have"),
        (as_json({**JOB, "id": 7}), "id: Input should be a valid string"),
        ((200, {}, b"[" * 1000 + b"]" * 1000), "answers in a shape"),
        ((200, {}, b"[" * 200_000), "no JSON"),
        ((200, {}, b" " * (16 * 2**20 + 1)), "more than 16,777,216 bytes"),
        ((302, {"Location": "http://elsewhere/"}, b""), "redirects to 'http://elsewhere/"),
    ],
)
def test_answers_that_are_none(answer: Answer, message: str, jobs: Jobs, server: FakeServer) -> None:
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", answer)
    out, err = jobs("show", JOB["id"], code=2)
    assert out == ""
    assert message in err
    assert len(err) < 1_000
    assert "\x1b" not in err
    assert len(server.asked) == 1


def test_a_stream_that_is_none(jobs: Jobs, server: FakeServer) -> None:
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", as_json({"data": []}))
    assert "no stream of events" in jobs("follow", JOB["id"], code=2)[1]
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", as_stream([], end="data: " + "x" * (2**20 + 10)))
    assert "an event of more than 1,048,576 bytes" in jobs("follow", JOB["id"], code=2)[1]


def test_a_question_is_asked_again_and_a_change_is_not(jobs: Jobs, server: FakeServer) -> None:
    away = as_error(503, "the database is away", Retry_After="0")
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", away, away, as_json(JOB))
    assert "waiting for the server: the database is away" in jobs("show", JOB["id"])[1]
    server.on(f"POST /fine_tuning/jobs/{JOB['id']}/cancel", away, as_json(JOB))
    assert "the database is away" in jobs("cancel", JOB["id"], code=2)[1]
    assert len(server.sent(f"POST /fine_tuning/jobs/{JOB['id']}/cancel")) == 1


def test_a_job_is_asked_for_again_as_the_same_one(jobs: Jobs, server: FakeServer) -> None:
    server.on("POST /fine_tuning/jobs", as_error(503, "away", Retry_After="0"), as_json(JOB))
    jobs("create", FILE["id"])
    keys = [headers["Idempotency-Key"] for method, _, headers, _ in server.asked if method == "POST"]
    assert len(keys) == 2
    assert len(set(keys)) == 1
    server.on("POST /fine_tuning/jobs", as_error(429, "too many jobs", Retry_After="0"), as_json(JOB))
    assert "too many jobs" in jobs("create", FILE["id"], code=2)[1]


def test_a_stream_that_ends_with_an_error_is_opened_again(jobs: Jobs, server: FakeServer) -> None:
    error = {"error": {"message": "the database is away", "type": "server_error", "param": None, "code": None}}
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", as_stream([EVENTS[0], error], end=""), as_stream(EVENTS[1:]))
    out, _ = jobs("follow", JOB["id"], "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()][:3] == [event["id"] for event in EVENTS]


def test_without_a_server(server: FakeServer) -> None:
    server.close()
    _, err = run("jobs", "--url", server.url, code=2)
    assert "cannot be reached" in err
    assert "prefixtune serve" in err


@pytest.mark.parametrize(
    ("environment", "words", "sent"),
    [
        ({}, [], None),
        ({"PREFIXTUNE_API_KEY": "pt-a"}, [], "Bearer pt-a"),
        ({"PREFIXTUNE_API_KEY": "pt-a"}, ["--key", "pt-b"], "Bearer pt-b"),
        # The key of another service stays here.
        ({"OPENAI_API_KEY": "sk-a"}, [], None),
        ({"OPENAI_API_KEY": "sk-a", "OPENAI_BASE_URL": "https://api.openai.com/v1"}, [], None),
        ({"OPENAI_API_KEY": "sk-a", "OPENAI_BASE_URL": "{url}/"}, [], "Bearer sk-a"),
    ],
)
def test_which_key_is_sent(
    environment: dict[str, str],
    words: list[str],
    sent: str | None,
    jobs: Jobs,
    server: FakeServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.format(url=server.url))
    # A proxy of the environment is not for this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    jobs("list", *words)
    assert server.asked[0][2].get("Authorization") == sent
