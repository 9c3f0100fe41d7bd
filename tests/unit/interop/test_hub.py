"""Pushing and pulling against a local fake of the hub's HTTP calls."""

import base64
import hashlib
import json

import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from fake_server import FakeServer
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError, ConfigError, PrefixError
from prefixtune.prefix.hub import FILE
from prefixtune.prefix.prefix import Prefix

COMMIT = "0123456789abcdef0123456789abcdef01234567"
LICENSES = (None, "apache-2.0", "cc-by-4.0", "other")
"""Some that the hub takes; it refuses a card with any other spelling."""


class Hub:
    """As much of the hub as an upload and a download need: repositories of small files, one commit."""

    def __init__(self):
        self.repos = {}
        self.calls = []
        self.created = []
        self.refuse = None
        self.server = FakeServer(self.answer)
        self.url = self.server.url

    def answer(self, method, path, headers, body):
        self.calls.append((method, path))
        return self.take(path, body) if method == "POST" else self.give(path)

    def take(self, path, body):
        if self.refuse:
            return self.refuse, {"error": "not today"}, {"X-Error-Message": "not today"}
        if path == "/api/repos/create":
            asked = json.loads(body)
            self.created.append(asked)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.repos.setdefault(name, {})
            return 200, {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            license_id = ModelCard(json.loads(body)["content"]).data.license
            errors = [] if license_id in LICENSES else [{"message": f'"license" must be one of {LICENSES}'}]
            return 400 if errors else 200, {"errors": errors, "warnings": []}
        if "/preupload/" in path:
            names = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": one, "uploadMode": "regular", "shouldIgnore": False} for one in names]}
        name = path.removeprefix("/api/models/").partition("/commit/")[0]
        for entry in map(json.loads, body.splitlines()):
            if entry["key"] == "file":
                self.repos[name][entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
        return 200, {"commitUrl": f"{self.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}

    def give(self, path):
        name, _, rest = path.lstrip("/").partition("/resolve/")
        if name not in self.repos:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        data = self.repos[name].get(rest.partition("/")[2])
        if data is None:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        return 200, data, {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}


@pytest.fixture
def fake_hub(monkeypatch, tmp_path):
    hub = Hub()
    for name, value in {
        "ENDPOINT": hub.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_CACHE": str(tmp_path / "cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("HF_TOKEN", "hf_local")
    yield hub
    hub.server.close()


@pytest.fixture
def artifact(llama, save_random_prefix, tmp_path):
    facts = {"task": "e2e", "license": "CC-BY-4.0", "training": {"steps": 9, "num_targets": 5}}
    return save_random_prefix(tmp_path / "mine.safetensors", llama, **facts)


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
