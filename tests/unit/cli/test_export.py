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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to", "llamacpp"], "--to is 'llamacpp'"),
        (["--to", "onnx", "--kv-type", "f16"], "--kv-type is for llama.cpp"),
        (["--to", "onnx", "--dtype", "bfloat16"], "the backbone is in torch.bfloat16"),
    ],
)
def test_mistakes_exit_with_2(
    arguments: list[str],
    message: str,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Every one of them is refused before the extra's libraries are used.
    for module in ("onnx", "onnxscript", "onnxruntime"):
        monkeypatch.setitem(sys.modules, module, sys.modules[__name__])
    assert export(trained, "--output", tmp_path / "out", *arguments) == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert message in shown
    assert "hint:" in shown
    assert not (tmp_path / "out" / "export.json").exists()


def test_a_missing_extra_says_the_install_line(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(trained, "--to", "onnx", "--output", tmp_path / "out") == 2
    shown = " ".join(capsys.readouterr().err.split())
    assert "pip install 'prefixtune[export]'" in shown
    assert "loading" not in shown
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_written_over(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.toml", "prefix.safetensors", "README.md"):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("mine")
        assert export(trained, "--to", "llama.cpp", "--output", folder) == 2
        shown = capsys.readouterr().err
        assert name in shown
        assert "loading" not in shown
        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [(name, "mine")]


def test_files_are_named_after_the_run(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "inns"
    run.mkdir()
    for name in ("prefix", "more", "two words"):
        (run / f"{name}.safetensors").write_bytes(trained.read_bytes())
    monkeypatch.chdir(run)
    for given, name in (
        (".", "inns"),
        ("prefix.safetensors", "inns"),
        (f"{trained}+more.safetensors", "pubs+more"),
        ("two words.safetensors", "two-words"),
    ):
        assert main(["export", given, "--to", "llama.cpp", "--output", str(tmp_path / "out"), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["file"] == f"{name}.bin"


def test_another_backbone_of_other_weights(
    trained: Path, tmp_path: Path, tiny_models: Make, tiny_tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_models("llama", seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["--to", "llama.cpp", "--output", tmp_path / "out", "--backbone", tmp_path / "other"]
    assert export(trained, *arguments) == 2
    assert "with other weights" in " ".join(capsys.readouterr().err.split())
    assert export(trained, *arguments, "--allow-other-backbone", "--quiet") == 0
