"""What the command line says of mistakes: a line with a hint to people, JSON to programs."""

import json

import pytest
import torch

from prefixtune.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "kind", "named"),
    [
        (["train", "--json", "--seed", "x"], "ConfigError", "--seed"),
        (["inspect", "/nowhere.safetensors", "--json"], "CheckpointError", "/nowhere.safetensors"),
    ],
)
def test_with_json_a_mistake_is_one_object_on_stderr(arguments, kind, named, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    error = json.loads(err)
    assert error.keys() == {"error", "hint", "kind", "exit_code"}
    assert (error["kind"], error["exit_code"]) == (kind, 2)
    assert named in error["error"]


def test_an_interruption_is_json_too(tmp_path, monkeypatch, capsys):
    def stopped(*given, **more):
        raise KeyboardInterrupt("the state is saved")

    monkeypatch.setattr("prefixtune.backbone.prefixes.load_prefix", stopped)
    (tmp_path / "any.safetensors").touch()
    assert main(["inspect", str(tmp_path / "any.safetensors"), "--json"]) == 130
    message = json.loads(capsys.readouterr().err)
    assert message == {"error": "interrupted.", "hint": "the state is saved", "kind": "Interrupted", "exit_code": 130}


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand more"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    ],
)
def test_too_little_memory_is_no_bug(error, tmp_path, monkeypatch, capsys):
    def too_large(*given, **more):
        raise error

    monkeypatch.setattr("prefixtune.backbone.prefixes.load_prefix", too_large)
    (tmp_path / "any.safetensors").touch()
    words = ["inspect", str(tmp_path / "any.safetensors")]
    assert main([*words, "--json"]) == 2
    message = json.loads(capsys.readouterr().err)
    assert (message["kind"], message["exit_code"]) == ("OutOfMemoryError", 2)
    assert main(words) == 2
    assert "--batch-size" in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(tmp_path, monkeypatch):
    def broken(*given, **more):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("prefixtune.backbone.prefixes.load_prefix", broken)
    (tmp_path / "any.safetensors").touch()
    with pytest.raises(ZeroDivisionError):
        main(["inspect", str(tmp_path / "any.safetensors"), "--json"])
