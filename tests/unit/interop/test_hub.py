"""Pushing and pulling, with stand-ins for the functions of the hub's library."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import huggingface_hub.constants
import pytest
from huggingface_hub import ModelCard

from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError, ConfigError, PrefixError
from prefixtune.prefix.hub import FILE
from prefixtune.prefix.prefix import Prefix, save_prefix

URL = "https://hub"
LICENSES = (None, "apache-2.0", "cc-by-4.0", "other")
"""Some that the hub takes; it refuses a card with any other spelling."""


class Hub:
    """What the hub was told by its library, and the files that it has."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.created: list[dict[str, Any]] = []
        self.pulled: list[str | None] = []
        self.refuses = False


@pytest.fixture
def fake_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    hub = Hub()

    def create_repo(api: Any, repo_id: str, **options: Any) -> None:
        if hub.refuses:
            raise OSError("not today")
        hub.created.append(options)
        hub.repos.setdefault(repo_id, {})

    def create_commit(api: Any, repo_id: str, operations: Any, **options: Any) -> Any:
        for one in operations:
            with one.as_file() as file:
                hub.repos[repo_id][one.path_in_repo] = file.read()
        return SimpleNamespace(commit_url=f"{URL}/{repo_id}")

    def download(repo_id: str, filename: str, *, revision: str | None = None, **options: Any) -> str:
        hub.pulled.append(revision)
        path = tmp_path / "cache" / repo_id / filename
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.repos[repo_id][filename])
        return str(path)

    def validate(card: ModelCard, **options: Any) -> None:
        if card.data.license not in LICENSES:
            raise ValueError(f"license must be one of {LICENSES}")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    monkeypatch.setattr(ModelCard, "validate", validate)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return hub


@pytest.fixture
def artifact(tiny_backbone: Callable[..., Any], random_prefix: Callable[..., Any], tmp_path: Path) -> Path:
    backbone = tiny_backbone("llama")
    header = make_header(backbone, task="e2e", license="CC-BY-4.0", training={"steps": 9, "num_targets": 5})
    return save_prefix(tmp_path / "mine.safetensors", Prefix(random_prefix(backbone, 4).layers, header))


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    scores = {"bleu": {"score": 60.3338, "implementation": "sacrebleu 2.6.0", "interval": [58.516, 62.131]}}
    facts = {"kind": "evaluation", "task": "e2e", "data": "e2e", "split": "test", "num_examples": 300, "scores": scores}
    folder = tmp_path / "evaluation"
    folder.mkdir()
    (folder / "evaluation.json").write_text(json.dumps(facts))
    return folder


def test_what_was_pushed_is_pulled(fake_hub: Hub, artifact: Path, evaluation: Path) -> None:
    url = load_prefix(artifact).push_to_hub("me/pubs", evaluation=evaluation)
    assert url == f"{URL}/me/pubs"
    assert fake_hub.created[0]["private"] is True
    assert fake_hub.repos["me/pubs"].keys() == {"prefix.safetensors", "README.md"}
    for pulled in (load_prefix("hub:me/pubs"), *map(Prefix.from_pretrained, ("me/pubs", "hub:me/pubs"))):
        assert pulled.equal(load_prefix(artifact))
        assert pulled.header["task"] == "e2e"
    Prefix.from_pretrained("me/pubs", revision="v2")
    assert fake_hub.pulled == [None] * 3 + ["v2"]


def test_a_missing_path_is_never_looked_for_on_the_hub(
    fake_hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for name in ("runs/missing", "./me/missing", "me/missing.safetensors", "missing", "me/pubs"):
        with pytest.raises(CheckpointError):
            load_prefix(name)
    for name in ("hub:pubs", "hub:", "hub:me/pubs/prefix.safetensors", "hub:../pubs"):
        with pytest.raises(ConfigError):
            load_prefix(name)
    assert fake_hub.pulled == [], "the hub was asked for a path"


@pytest.mark.parametrize(
    ("license_note", "fields"),
    [
        ("ACME's Model License", ("other", "acme-s-model-license")),
        ("", (None, None)),
    ],
)
def test_any_license_note_becomes_one_that_the_hub_takes(
    license_note: str, fields: tuple[str | None, str | None], fake_hub: Hub, artifact: Path, rewrite_header: Any
) -> None:
    rewrite_header(artifact, license=license_note)
    load_prefix(artifact).push_to_hub("me/pubs")
    card = ModelCard(fake_hub.repos["me/pubs"]["README.md"].decode())
    assert (card.data.license, card.data.license_name) == fields
    assert f"| license | {license_note} |" in card.text or not license_note


def test_a_path_that_exists_is_not_looked_for_on_the_hub(
    fake_hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Prefix.from_pretrained(artifact).save_pretrained("me/pubs")
    assert Prefix.from_pretrained("me/pubs").equal(load_prefix(artifact))
    with pytest.raises(ConfigError, match="is no repository of the hub"):
        Prefix.from_pretrained("me/pubs", revision="v2")
    assert fake_hub.pulled == []
    with pytest.raises(PrefixError, match="me/none"):
        Prefix.from_pretrained("me/none")


def test_the_commands(
    fake_hub: Hub, artifact: Path, evaluation: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["push", str(artifact), "me/pubs", "--card", "--evaluation", str(evaluation)]) == 0
    assert capsys.readouterr().out.startswith("---\n")
    assert fake_hub.created == [], "a card is only shown"
    assert main(["push", str(artifact), "me/pubs", "--public", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["repo"] == "me/pubs"
    out = tmp_path / "new" / "theirs.safetensors"
    assert main(["convert", "hub:me/pubs@main", str(out), "--to", "prefixtune", "--quiet"]) == 0
    assert "theirs.safetensors" in capsys.readouterr().out
    assert out.exists()


def test_errors_are_reported_and_change_nothing(fake_hub: Hub, artifact: Path, tmp_path: Path) -> None:
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
    assert fake_hub.created == [], "nothing left this machine"
    fake_hub.refuses = True
    with pytest.raises(PrefixError, match="not today"):
        load_prefix(artifact).push_to_hub("me/pubs")


def test_without_the_hub_it_says_so(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(PrefixError, match="cannot upload"):
        load_prefix(artifact).push_to_hub("me/pubs")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    for call in (lambda: load_prefix("hub:me/pubs"), lambda: load_prefix(artifact).push_to_hub("me/pubs")):
        with pytest.raises(ConfigError):
            call()
