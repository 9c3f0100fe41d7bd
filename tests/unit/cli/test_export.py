"""`prefixtune export`: what it writes and prints, and what it refuses with exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.backbone.load import load_backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.cli.main import main
from prefixtune.prefix.prefix import Prefix, save_prefix

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, tiny_models: Make, tiny_tokenizer: Any, random_prefix: Make
) -> Path:
    """A prefix file that names its backbone's folder."""
    folder = tmp_path_factory.mktemp("trained")
    tiny_models("llama").save_pretrained(folder / "model")
    tiny_tokenizer.save_pretrained(folder / "model")
    backbone = load_backbone(folder / "model", device="cpu")
    prefix = random_prefix(backbone, 4)
    return save_prefix(folder / "pubs.safetensors", Prefix(prefix.layers, make_header(backbone, task="e2e")))


def export(trained: Path, *arguments: object) -> int:
    return main(["export", str(trained), *map(str, arguments)])


def test_llama_cpp(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "out"
    assert export(trained, "--to", "llama.cpp", "--output", folder, "--kv-type", "f32") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"{folder / 'pubs.bin'}; run {folder / 'check.py'} against the server")
    assert "exporting to llama.cpp" in shown.err
    facts = json.loads((folder / "export.json").read_text())
    assert (facts["kv_type"], facts["task"]) == ("f32", "e2e")
    assert export(trained, "--to", "llama.cpp", "--output", folder, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kv_type"], result["folder"]) == ("f16", str(folder))


def test_mistakes_exit_with_2(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for arguments, named in ((("llamacpp",), "--to"), (("onnx", "--kv-type", "f16"), "--kv-type")):
        assert export(trained, "--output", tmp_path / "out", "--to", *arguments) == 2
        assert named in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(trained, "--to", "onnx", "--output", tmp_path / "out") == 2
    assert "prefixtune[export]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_over(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "prefix.safetensors").write_text("mine")
    assert export(trained, "--to", "llama.cpp", "--output", tmp_path) == 2
    assert "loading" not in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]
