"""`prefixtune jobs` against a server that the test scripts: what is sent, what is shown, and every way to fail."""

import json

import pytest

from command_line import run
from fake_server import FakeServer

JOB = {
    "id": "ftjob-0123456789abcdef01234567",
    "created_at": 1_780_000_000,
    "model": "tiny",
    "status": "running",
    "fine_tuned_model": None,
    "prefixtune": {"name": "cats", "progress": {"step": 1, "total_steps": 4}},
}
FILE = {"id": "file-0123456789abcdef01234567", "filename": "rows.jsonl", "status": "processed"}
DONE = {**JOB, "status": "succeeded", "fine_tuned_model": "cats"}
EVENTS = [
    {"id": "ftevent-1", "level": "info", "message": "it begins", "data": {}},
    {"id": "ftevent-2", "level": "info", "data": {"step": 2, "total_steps": 4, "train_loss": 0.5}},
    {"id": "ftevent-3", "level": "info", "data": {"step": 3, "total_steps": 4, "train_loss": 1 / 3}},
]


def as_json(value, status=200):
    return status, value, {"Content-Type": "application/json"}


def as_error(status, message):
    return as_json({"error": {"message": message, "type": "x", "param": None, "code": None}}, status)


class Scripted:
    """A server that answers in the order that a test gives, and keeps what was asked."""

    def __init__(self):
        self.asked = []
        self.answers = {}
        self.server = FakeServer(self.answer)
        self.url = f"{self.server.url}/v1"

    def answer(self, method, path, headers, body):
        self.asked.append((method, path, dict(headers.items()), body))
        scripted = self.answers[f"{method} {path.partition('?')[0]}"]
        return scripted.pop(0) if len(scripted) > 1 else scripted[0]

    def on(self, request, *answers):
        method, path = request.split()
        self.answers[f"{method} /v1{path}"] = list(answers)

    def sent(self, request):
        method, path = request.split()
        return [body for asked, where, _, body in self.asked if (asked, where) == (method, f"/v1{path}")]


@pytest.fixture
def server(monkeypatch):
    for name in ("PREFIXTUNE_API_KEY", "OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("prefixtune.cli.commands.jobs._PAUSE", 0.01)
    server = Scripted()
    server.on("GET /fine_tuning/jobs", as_json({"object": "list", "data": [DONE, JOB], "has_more": False}))
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_json(DONE))
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}/events", as_json({"data": EVENTS[::-1]}))
    server.on("GET /models", as_json({"data": [{"id": "cats", "parent": "tiny"}, {"id": "tiny", "parent": None}]}))
    server.on("POST /files", as_json(FILE))
    server.on("POST /fine_tuning/jobs", as_json(JOB))
    yield server
    server.server.close()


@pytest.fixture
def jobs(server):
    return lambda *words, **options: run("jobs", *words, "--url", server.url, **options)


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    return path


def test_a_file_that_cannot_be_trained_on_makes_no_job(jobs, server, rows):
    server.on("POST /files", as_json({**FILE, "status": "error", "status_details": "line 7 is\x1b[2J wrong."}))
    _, err = jobs("create", str(rows), code=2)
    assert "line 7 is\ufffd[2J wrong." in err
    assert not server.sent("POST /fine_tuning/jobs")


def test_a_document_its_questions_and_options(jobs, server, rows):
    files = ("--document", "--questions", "self", "--model", "tiny", "--validation", FILE["id"])
    jobs("create", str(rows), *files, "--option", "n_epochs=3", "--option", "seed=1")
    assert b"\r\n\r\ndocument\r\n" in server.sent("POST /files")[0]
    assert json.loads(server.sent("POST /fine_tuning/jobs")[0]) == {
        "model": "tiny",
        "training_file": FILE["id"],
        "validation_file": FILE["id"],
        "seed": 1,
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 3}}},
        "prefixtune": {"questions": "self"},
    }


def test_mistakes_are_seen_before_anything_is_sent(jobs, server, rows):
    for words, named in (
        (["create"], "create"),
        (["list", "x"], "list"),
        (["create", str(rows), "--option", "length"], "--option"),
    ):
        assert named in jobs(*words, code=2)[1]
    assert server.asked == []
    _, err = run("jobs", "--url", "http://me:secret@here/v1", code=2)
    assert "--url" in err
    assert "secret" not in err


def test_follow_waits_for_a_server_that_is_away(jobs, server):
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_json(JOB), as_error(503, "starting"), as_json(DONE))
    events = f"GET /fine_tuning/jobs/{JOB['id']}/events"
    server.on(events, as_json({"data": EVENTS[1::-1]}), as_json({"data": EVENTS[::-1]}))
    out, err = jobs("follow", JOB["id"], "--json")
    assert [json.loads(line)["id"] for line in out.splitlines()] == [*(one["id"] for one in EVENTS), JOB["id"]]
    assert err == ""


def test_follow_says_what_became_of_it(jobs, server):
    error = {"code": "c", "message": "row 7\x1b[2J is wrong"}
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", as_json({**JOB, "status": "failed", "error": error}))
    out, err = jobs("follow", JOB["id"], code=1)
    assert out == ""
    assert "row 7\ufffd[2J is wrong" in err


# --- what a server may do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [(500, b"<html>"), as_json([]), (200, b"[" * 200_000), (302, b"", {"Location": "http://elsewhere/"})]
)
def test_answers_that_are_none(answer, jobs, server):
    server.on(f"GET /fine_tuning/jobs/{JOB['id']}", answer)
    out, err = jobs("show", JOB["id"], code=2)
    assert out == ""
    assert err.startswith("error: ")
    assert len(server.asked) == 1


def test_a_change_is_not_asked_for_again(jobs, server):
    server.on(f"POST /fine_tuning/jobs/{JOB['id']}/cancel", as_error(503, "the database is away"), as_json(JOB))
    assert "the database is away" in jobs("cancel", JOB["id"], code=2)[1]
    assert len(server.sent(f"POST /fine_tuning/jobs/{JOB['id']}/cancel")) == 1


def test_a_job_is_asked_for_again_as_the_same_one(jobs, server):
    server.on("POST /fine_tuning/jobs", as_error(503, "away"), as_json(JOB))
    jobs("create", FILE["id"])
    keys = [headers["Idempotency-Key"] for method, _, headers, _ in server.asked if method == "POST"]
    assert len(keys) == 2
    assert len(set(keys)) == 1


def test_which_key_is_sent(jobs, server, monkeypatch):
    # A proxy of the environment is not for this machine.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-a")
    # The key of another service stays here.
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    jobs()
    monkeypatch.setenv("OPENAI_BASE_URL", f"{server.url}/")
    jobs()
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-a")
    jobs()
    jobs("list", "--key", "pt-\u00e9")
    sent = [headers.get("Authorization") for _, _, headers, _ in server.asked]
    assert sent == [None, "Bearer sk-a", "Bearer pt-a", "Bearer pt-\u00c3\u00a9"]
