"""`prefixtune jobs` with a real server and its worker: a training from the file to the answer of its result."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from command_line import run
from live_server import MODEL, LiveServer, make_model
from prefixtune.server.auth import hash_key


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    folder = tmp_path_factory.mktemp("jobs")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    keys = "".join(f'[keys.{name}]\nhash = "{hash_key(f"pt-{name}")}"\n' for name in ("alice", "bob"))
    (folder / "serve.toml").write_text(f'data_folder = "{folder / "data"}"\ntrain_threads = 1\n{keys}')
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml"))
    yield server.wait()
    assert server.stop() == 0


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": f"b {n}"}) + "\n" for n in range(6)))
    return path


def test_from_a_file_to_an_answer(
    server: LiveServer, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-alice")
    url = ("--url", f"{server.url}/v1")
    steps = ("--option", "max_steps=3", "--option", "prefix_length=2", "--option", "preset=none")
    out, err = run("jobs", "create", str(rows), "--name", "cats", *steps, "--follow", *url)
    assert out == "cats\n"
    assert "training: 3/3 (100 %)" in err
    answer = server.post("/v1/completions", {"model": "cats", "prompt": "a 1", "max_tokens": 4}, key="pt-alice")
    assert answer[0] == 200
    (job,) = json.loads(run("jobs", "--json", *url)[0])["jobs"]
    assert (job["status"], job["fine_tuned_model"], job["model"]) == ("succeeded", "cats", MODEL)
    shown, _ = run("jobs", "show", job["id"], *url)
    assert "succeeded" in shown
    lines = [json.loads(line) for line in run("jobs", "follow", job["id"], "--json", *url)[0].splitlines()]
    assert [line["data"]["step"] for line in lines if line.get("type") == "metrics"][-1] == 3
    assert lines[-1]["id"] == job["id"]
    assert "can be cancelled" in run("jobs", "cancel", job["id"], *url, code=2)[1]
    assert "is taken" in run("jobs", "create", job["training_file"], "--name", "cats", *url, code=2)[1]
    # Somebody else sees nothing of it.
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-bob")
    assert json.loads(run("jobs", "--json", *url)[0]) == {"jobs": []}
    assert "there is no fine-tuning job" in run("jobs", "show", job["id"], *url, code=2)[1]
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-alice")
    run("jobs", "delete", "cats", *url)
    assert server.get("/v1/models/cats", key="pt-alice")[0] == 404
    run("jobs", "delete", job["training_file"], *url)
    assert job["training_file"] not in run("jobs", "files", *url)[0]


def test_a_wrong_file_and_a_wrong_key(server: LiveServer, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFIXTUNE_API_KEY", raising=False)
    url = ("--url", f"{server.url}/v1")
    assert "--key" in run("jobs", *url, code=2)[1]
    rows.write_text(rows.read_text() + '{"prompt": "no completion"}\n')
    out, err = run("jobs", "upload", str(rows), "--key", "pt-alice", *url, code=1)
    assert "7" in err
    assert "cannot be trained on" in run("jobs", "create", out.strip(), "--key", "pt-alice", *url, code=2)[1]
