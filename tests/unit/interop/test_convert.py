"""`prefixtune convert`: the input is recognized, the outcome is right, and mistakes end with 2."""

import json

import pytest
import torch
from safetensors.torch import save_file

from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.cli.main import main
from prefixtune.interop.peft import export_peft
from prefixtune.prefix.prefix import Prefix, save_prefix


@pytest.fixture(scope="module")
def model(save_model, tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2")


@pytest.fixture
def prefix(tiny_backbone, random_prefix):
    backbone = tiny_backbone("gpt2")
    return Prefix(random_prefix(backbone, 4).detach().layers, make_header(backbone, task="toy"))


@pytest.fixture
def ours(prefix, tmp_path):
    return save_prefix(tmp_path / "p.safetensors", prefix)


def convert(capsys, *words):
    assert main(["convert", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_there_and_back(ours, prefix, tmp_path, capsys):
    adapter, back = tmp_path / "adapter", tmp_path / "back.safetensors"
    assert convert(capsys, ours, adapter, "--to", "peft") == {
        "from": "prefixtune",
        "to": "peft",
        "input": str(ours),
        "output": str(adapter),
        "backbone": "tiny-gpt2",
        "prefix_length": {"decoder": 4},
        "parameters": prefix.num_parameters,
    }
    assert convert(capsys, adapter, back, "--to", "prefixtune")["from"] == "peft"
    assert load_prefix(back).equal(prefix)
    assert load_prefix(back).header["task"] == "toy"


def test_the_folder_of_a_run(ours, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    ours.rename(run / "prefix.safetensors")
    assert convert(capsys, run, tmp_path / "adapter", "--to", "peft")["from"] == "prefixtune"
    assert convert(capsys, run, tmp_path / "same.safetensors", "--to", "prefixtune")["input"] == str(run)
    # An adapter's folder stays one, whatever else is in it.
    (tmp_path / "adapter" / "prefix.safetensors").write_bytes(b"")
    assert convert(capsys, tmp_path / "adapter", tmp_path / "back.safetensors", "--to", "prefixtune")["from"] == "peft"


def test_the_backbone_is_checked_and_named(ours, model, prefix, tmp_path, capsys):
    bare = export_peft(Prefix(prefix.layers), tmp_path / "bare")
    made = convert(capsys, bare, tmp_path / "q.safetensors", "--to", "prefixtune", "--backbone", model)
    assert made["backbone"] == str(model)
    assert load_prefix(tmp_path / "q.safetensors").header["backbone"]["fingerprint"]
    convert(capsys, ours, tmp_path / "adapter", "--to", "peft", "--backbone", model)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        model
    )


def test_mistakes_end_with_2(ours, tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    save_file({"other": torch.zeros(2)}, tmp_path / "other.safetensors")
    torch.save({}, tmp_path / "pickle.bin")
    for words in (
        (tmp_path / "none", out, "--to", "prefixtune"),
        (ours, out, "--to", "onnx"),
        (tmp_path / "other.safetensors", out, "--to", "prefixtune"),
        (tmp_path / "pickle.bin", out, "--to", "prefixtune"),
    ):
        assert main(["convert", *map(str, words)]) == 2
        assert "hint:" in capsys.readouterr().err
    assert not out.exists()
