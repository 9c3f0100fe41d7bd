"""`prefixtune jobs` with a real server and its worker: a training from the file to the answer of its result."""

import json

import httpx2
import openai
import pytest

from command_line import run
from live_server import MODEL, fill_folder, serve
from prefixtune.prefix.prefix import read_artifact
from small_document import DOCUMENT
from training_jobs import wait_until


@pytest.fixture(scope="module")
def server(folder):
    settings = f'data_folder = "{folder / "data"}"\ntrain_threads = 1'
    fill_folder(folder, settings=settings, keys={"alice": "", "bob": ""})
    server = serve(folder)
    yield server
    assert server.stop() == 0


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a {n}", "completion": f"b {n}"}) + "\n" for n in range(6)))
    return path


def test_from_a_file_to_an_answer(server, rows, tmp_path, monkeypatch):
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
    run("jobs", "cancel", job["id"], *url, code=2)
    assert "cats" in run("jobs", "create", job["training_file"], "--name", "cats", *url, code=2)[1]
    # Somebody else sees nothing of it.
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-bob")
    assert json.loads(run("jobs", "--json", *url)[0]) == {"jobs": []}
    run("jobs", "show", job["id"], *url, code=2)
    monkeypatch.setenv("PREFIXTUNE_API_KEY", "pt-alice")
    run("jobs", "delete", "cats", *url)
    assert server.get("/v1/models/cats", key="pt-alice")[0] == 404
    run("jobs", "delete", job["training_file"], *url)
    assert job["training_file"] not in run("jobs", "files", *url)[0]


def test_no_path_of_the_server_leaves_it(server, folder, rows, tmp_path):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="pt-alice", max_retries=0)
    upload = client.files.create(file=rows, purpose="fine-tune").id
    text = client.files.create(file=("notes.txt", DOCUMENT.encode()), purpose="document")
    asked = [
        ({"training_file": upload, "validation_file": upload}, {"prefix_length": 2, "eval_every": 1, "preset": "none"}),
        ({"training_file": text.id}, {"prefix_length": 4, "num_questions": 5, "answer_length": 3}),
        # Fails: the document is shorter than that.
        ({"training_file": text.id}, {"prefix_length": 400}),
    ]
    seen = []
    for number, (files, options) in enumerate(asked):
        extra = {"prefixtune": {"name": f"kept{number}", "max_steps": 2, **options}}
        job = client.fine_tuning.jobs.create(model=MODEL, **files, extra_body=extra)
        wait_until(lambda job=job: client.fine_tuning.jobs.retrieve(job.id).status in ("succeeded", "failed"))
        ended = client.fine_tuning.jobs.retrieve(job.id)
        assert ended.status == ("failed" if number == 2 else "succeeded"), ended.error
        events = client.fine_tuning.jobs.list_events(job.id, limit=100)
        checkpoints = client.fine_tuning.jobs.checkpoints.list(job.id)
        seen += [ended.to_json(), *(one.to_json() for one in [*events, *checkpoints])]
        seen += [client.files.content(file).text for file in ended.result_files]
        if ended.fine_tuned_model:
            got = httpx2.get(
                f"{server.url}/v1/models/{ended.fine_tuned_model}/file", headers={"Authorization": "Bearer pt-alice"}
            )
            got.raise_for_status()
            (tmp_path / "got.safetensors").write_bytes(got.content)
            header = read_artifact(tmp_path / "got.safetensors").header
            assert header["backbone"]["name"] == MODEL
            seen += [json.dumps(header), got.content.decode("latin-1")]
    seen += [json.dumps(server.get(path, key="pt-alice")) for path in ("/v1/models", "/v1/status", "/openapi.json")]
    assert not [text for text in seen if str(folder) in text]
    # What a reader of the run's folder sees.
    reports = [json.loads(path.read_text()) for path in (folder / "data").glob("jobs/*/run/distill.json")]
    assert [(report["subject"], report["memory"]) for report in reports] == [("document", "prefix.safetensors")]
