"""Pushing and pulling against a local fake of the hub's HTTP calls."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError, ConfigError, PrefixError
from prefixtune.prefix.hub import FILE
from prefixtune.prefix.prefix import Prefix, save_prefix

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LICENSES = (None, "apache-2.0", "cc-by-4.0", "other")
"""Some that the hub takes; it refuses a card with any other spelling."""


class Hub(ThreadingHTTPServer):
    """As much of the hub as an upload and a download need: repositories of small files, one commit."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos = {}
        self.calls = []
        self.created = []
        self.refuse = None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", **headers):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def read_body(self):
        if "Content-Length" in self.headers:
            return self.rfile.read(int(self.headers["Content-Length"]))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def do_POST(self):
        body = self.read_body()
        self.server.calls.append(("POST", self.path))
        if self.server.refuse:
            self.answer(self.server.refuse, {"error": "not today"}, X_Error_Message="not today")
            return
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            self.server.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.server.repos.setdefault(name, {})
            self.answer(200, {"url": f"{self.server.url}/{name}"})
            return
        if self.path == "/api/validate-yaml":
            license_id = ModelCard(json.loads(body)["content"]).data.license
            errors = [] if license_id in LICENSES else [{"message": f'"license" must be one of {LICENSES}'}]
            self.answer(400 if errors else 200, {"errors": errors, "warnings": []})
            return
        name, _, what = self.path.removeprefix("/api/models/").partition("/preupload/")
        if what:
            files = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
            return
        name = self.path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                self.server.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        self.answer(
            200, {"commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
        )

    def do_GET(self):
        self.server.calls.append((self.command, self.path))
        name, _, rest = self.path.lstrip("/").partition("/resolve/")
        file = rest.partition("/")[2]
        data = self.server.repos.get(name, {}).get(file)
        if name not in self.server.repos:
            self.answer(404, X_Error_Code="RepoNotFound")
        elif data is None:
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        huggingface_hub.constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def artifact(tiny_backbone, random_prefix, tmp_path):
    backbone = tiny_backbone("llama")
    header = make_header(backbone, task="e2e", license="CC-BY-4.0", training={"steps": 9, "num_targets": 5})
    return save_prefix(tmp_path / "mine.safetensors", Prefix(random_prefix(backbone, 4).layers, header))


@pytest.fixture
def evaluation(tmp_path):
    scores = {"bleu": {"score": 60.3338, "implementation": "sacrebleu 2.6.0", "interval": [58.516, 62.131]}}
    facts = {"kind": "evaluation", "task": "e2e", "data": "e2e", "split": "test", "num_examples": 300, "scores": scores}
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


def test_what_was_pushed_is_pulled(fake_hub, artifact, evaluation):
    url = load_prefix(artifact).push_to_hub("me/pubs", evaluation=evaluation)
    assert url == f"{fake_hub.url}/me/pubs/commit/{COMMIT}"
    assert fake_hub.created[0].get("private") is True or fake_hub.created[0].get("visibility") == "private"
    assert fake_hub.repos["me/pubs"].keys() == {"prefix.safetensors", "README.md"}
    for pulled in (load_prefix("hub:me/pubs"), *map(Prefix.from_pretrained, ("me/pubs", "hub:me/pubs"))):
        assert pulled.equal(load_prefix(artifact))
        assert pulled.header["task"] == "e2e"
    Prefix.from_pretrained("me/pubs", revision="v2")
    assert any("/resolve/v2/" in path for _, path in fake_hub.calls)


def test_a_missing_path_is_never_looked_for_on_the_hub(fake_hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/missing", "./me/missing", "me/missing.safetensors", "missing", "me/pubs"):
        with pytest.raises(CheckpointError):
            load_prefix(name)
    for name in ("hub:pubs", "hub:", "hub:me/pubs/prefix.safetensors", "hub:../pubs"):
        with pytest.raises(ConfigError):
            load_prefix(name)
    assert fake_hub.calls == [], "the hub was asked for a path"


@pytest.mark.parametrize(
    ("license_note", "fields"),
    [
        ("CC-BY-4.0", ("cc-by-4.0", None)),
        ("ACME's Model License", ("other", "acme-s-model-license")),
        ("", (None, None)),
    ],
)
def test_any_license_note_becomes_one_that_the_hub_takes(license_note, fields, fake_hub, artifact, rewrite_header):
    rewrite_header(artifact, license=license_note)
    load_prefix(artifact).push_to_hub("me/pubs")
    card = ModelCard(fake_hub.repos["me/pubs"]["README.md"].decode())
    assert (card.data.license, card.data.license_name) == fields
    assert f"| license | {license_note} |" in card.text or not license_note


def test_a_path_that_exists_is_not_looked_for_on_the_hub(fake_hub, artifact, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Prefix.from_pretrained(artifact).save_pretrained("me/pubs")
    assert Prefix.from_pretrained("me/pubs").equal(load_prefix(artifact))
    with pytest.raises(ConfigError, match="is no repository of the hub"):
        Prefix.from_pretrained("me/pubs", revision="v2")
    assert fake_hub.calls == []
    with pytest.raises(PrefixError, match="me/none"):
        Prefix.from_pretrained("me/none")


def test_the_commands(fake_hub, artifact, evaluation, tmp_path, capsys):
    assert main(["push", str(artifact), "me/pubs", "--card", "--evaluation", str(evaluation)]) == 0
    assert capsys.readouterr().out.startswith("---\n")
    assert fake_hub.calls == [], "a card is only shown"
    assert main(["push", str(artifact), "me/pubs", "--public", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repo"] == "me/pubs"
    out = tmp_path / "new" / "theirs.safetensors"
    assert main(["convert", "hub:me/pubs@main", str(out), "--to", "prefixtune", "--quiet"]) == 0
    assert "theirs.safetensors" in capsys.readouterr().out
    assert out.exists()


def test_errors_are_reported_and_change_nothing(fake_hub, artifact, tmp_path):
    fake_hub.repos |= {"me/empty": {}, "me/broken": {FILE: b"not a prefix"}}
    for name in ("me/nothing", "me/empty", "me/broken"):
        with pytest.raises(PrefixError):
            load_prefix(f"hub:{name}")
    prefix = load_prefix(artifact)
    adapted = Prefix(prefix.layers, {**prefix.header, "adapter": "adapter"})
    for file, name in ((artifact, "me//pubs"), (tmp_path / "missing.safetensors", "me/pubs")):
        with pytest.raises(PrefixError):
            load_prefix(file).push_to_hub(name)
    with pytest.raises(ConfigError, match="LoRA"):
        adapted.push_to_hub("me/pubs")
    with pytest.raises(ConfigError):
        load_prefix(artifact).push_to_hub("me/pubs", evaluation=tmp_path)
    assert not [call for call in fake_hub.calls if call[0] == "POST"], "nothing left this machine"
    fake_hub.refuse = 403
    with pytest.raises(PrefixError, match="not today"):
        load_prefix(artifact).push_to_hub("me/pubs")


def test_without_the_hub_it_says_so(fake_hub, artifact, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PrefixError, match="cannot upload"):
        load_prefix(artifact).push_to_hub("me/pubs")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: load_prefix("hub:me/pubs"), lambda: load_prefix(artifact).push_to_hub("me/pubs")):
        with pytest.raises(ConfigError):
            call()
