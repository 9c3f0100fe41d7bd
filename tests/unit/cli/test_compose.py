"""`prefixtune compose`: what they write, and that nothing is written where a file is wrong."""

import json
from pathlib import Path

import pytest

from prefixtune.cli.main import main
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.prefix import Prefix, read_artifact, save_prefix


@pytest.fixture
def folder(llama, tiny_backbone, save_random_prefix, tmp_path, monkeypatch):
    """Prefixes of one tiny LLaMA (`old` as before headers had a rotation), and one of other weights."""
    monkeypatch.chdir(tmp_path)
    save_random_prefix("manual.safetensors", llama, 4, task="e2e", training={"dev_loss": 1.25})
    save_random_prefix("style.safetensors", llama, 3, task="xsum")
    save_random_prefix("long.safetensors", llama, 156)
    save_random_prefix("other.safetensors", tiny_backbone("llama", seed=1), 4)
    manual = read_artifact("manual.safetensors")
    header = {key: value for key, value in manual.header.items() if key != "rotation"}
    save_prefix("old.safetensors", Prefix(manual.layers, header))
    return tmp_path


def _error(arguments, capsys):
    """What is said of a wrong command, which writes nothing."""
    before = sorted(Path().iterdir())
    assert main(arguments.split()) == 2
    assert sorted(Path().iterdir()) == before
    return capsys.readouterr().err


def test_joined_files_have_both_and_say_so(folder, capsys):
    command = "compose manual.safetensors style.safetensors --output both.safetensors --json"
    assert main(command.split()) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["prefix_length"] == {"decoder": 7}
    assert [part["name"] for part in said["parts"]] == ["manual.safetensors", "style.safetensors"]
    manual, style, both = (read_artifact(f"{name}.safetensors") for name in ("manual", "style", "both"))
    assert both.equal(concatenate([manual, style]))
    assert both.header["composition"]["parts"] == said["parts"]
    assert said["parts"][0]["dev_loss"] == 1.25
    assert said["file_bytes"] == Path("both.safetensors").stat().st_size
    assert both.header["task"] == "xsum"


@pytest.fixture
def loaded(tiny_backbone, monkeypatch):
    """The names of the backbones that were loaded; each is the tiny LLaMA."""
    import prefixtune.backbone.load as loading

    names = []

    def load(name, **options):
        names.append(name)
        return tiny_backbone("llama")

    monkeypatch.setattr(loading, "load_backbone", load)
    return names


def test_an_older_files_backbone_is_run(folder, loaded):
    assert main(["compose", "old.safetensors", "old.safetensors", "--output", "both.safetensors"]) == 0
    assert main(["compose", "manual.safetensors", "old.safetensors", "--output", "known.safetensors"]) == 0
    assert loaded == ["tiny-llama"]
    assert read_artifact("both.safetensors").equal(concatenate([read_artifact("manual.safetensors")] * 2))


def test_cut_files(folder, capsys):
    assert main(["compose", "manual.safetensors", "--length", "2", "--output", "short.safetensors", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["prefix_length"], said["mode"], said["exact"]) == ({"decoder": 2}, "cut", True)
    manual = read_artifact("manual.safetensors")
    assert read_artifact("short.safetensors").equal(manual[:2])


def test_what_does_not_belong_together_is_refused(folder, capsys):
    for command in (
        "manual.safetensors other.safetensors",
        "manual.safetensors long.safetensors",
        "manual.safetensors style.safetensors --mode average",
        "none.safetensors nothing.safetensors",
        "manual.safetensors",
    ):
        assert _error(f"compose {command} --output x.safetensors", capsys)
