"""`prefixtune export`: what it writes and prints, and what it refuses with exit code 2."""

import json
import shutil
import sys

import pytest

from prefixtune.backbone.load import load_backbone
from prefixtune.cli.main import main


@pytest.fixture(scope="module")
def trained(tmp_path_factory, save_model, save_random_prefix):
    """A prefix file that names its backbone's folder."""
    folder = tmp_path_factory.mktemp("trained")
    backbone = load_backbone(save_model(folder / "model"), device="cpu")
    return save_random_prefix(folder / "pubs.safetensors", backbone, task="e2e")


def export(trained, *arguments):
    return main(["export", str(trained), *map(str, arguments)])


def test_llama_cpp(trained, tmp_path, capsys):
    folder = tmp_path / "out"
    assert export(trained, "--to", "llama.cpp", "--output", folder, "--kv-type", "f32") == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(str(folder / "pubs.bin"))
    assert "exporting to llama.cpp" in shown.err
    facts = json.loads((folder / "export.json").read_text())
    assert (facts["kv_type"], facts["task"]) == ("f32", "e2e")
    named = shutil.copy(trained, tmp_path / "-日本 2.safetensors")
    assert export(named, "--to", "llama.cpp", "--output", tmp_path / "named") == 0
    assert (tmp_path / "named" / "日本-2.bin").is_file()
    capsys.readouterr()
    assert export(trained, "--to", "llama.cpp", "--output", folder, "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kv_type"], result["folder"]) == ("f16", str(folder))


def test_mistakes_exit_with_2(trained, tmp_path, monkeypatch, capsys):
    for arguments, named in ((("llamacpp",), "--to"), (("onnx", "--kv-type", "f16"), "--kv-type")):
        assert export(trained, "--output", tmp_path / "out", "--to", *arguments) == 2
        assert named in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert export(trained, "--to", "onnx", "--output", tmp_path / "out") == 2
    assert "prefixtune[export]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["prefix.safetensors", "config.json", "export.json"])
def test_a_run_a_model_or_another_export_is_not_written_over(trained, tmp_path, capsys, name):
    (tmp_path / name).write_text('{"target": "onnx"}')
    assert export(trained, "--to", "llama.cpp", "--output", tmp_path) == 2
    assert "loading" not in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ['{"target": "onnx"}']
