"""What commands write to: checked before anything loads, and left as it was by a refused command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.cli.main import main

TOY = ["--task", "toy", "--train", "train", "--dev", "held_out", "--test", "held_out"]


def test_a_run_that_no_demo_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert (tmp_path / "prefix.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--task", "e2e", "--train", "nowhere.csv", "--output", "{}/r1/r2/r3"],
        ["report", "nowhere", "--output", "{}/new/deep/a.html"],
        ["evaluate", "--task", "e2e", "--data", "nowhere.csv", "--output", "{}/new/scores"],
    ],
    ids=lambda words: words[0],
)
def test_a_refused_command_leaves_no_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in words]) == 2
    assert "nowhere" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--task", "toy", "--output", "{}/run"],
        ["demo", "--output", "{}/run"],
        ["export", "{prefix}", "--to", "llama.cpp", "--output", "{}/out"],
        ["convert", "{prefix}", "{}/p.safetensors", "--to", "prefixtune", "--backbone", "none"],
        ["convert", "{prefix}", "{}/adapter", "--to", "peft", "--backbone", "none"],
        ["evaluate", "--prefix", "{prefix}", "--task", "toy", "--data", "held_out", "--output", "{}/scores"],
        ["evaluate", "--prefix", "{prefix}", "--task", "toy", "--data", "held_out", "--outputs", "{}/out.txt"],
        ["pull", "me/prefix", "{}/p.safetensors"],
        ["report", "{run}", "--output", "{}/report.html"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_that_cannot_be_written_is_refused_before_anything_loads(
    words: list[str],
    tiny_backbone: Callable[..., Any],
    random_prefix: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    backbone = tiny_backbone("llama")
    prefix = pt.Prefix(random_prefix(backbone, 2).layers, {"backbone": {"name": "none"}, "task": "toy"})
    pt.save_prefix(tmp_path / "p.safetensors", prefix)
    if "{run}" in words:
        run = {"prefix_length": 2, "init_text": "ab", "max_steps": 3, "output": str(tmp_path / "run")}
        pt.train(run, backbone=backbone, examples=[pt.Example("n : a", ("aa it is.",))])
        capsys.readouterr()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is loaded")

    for name in ("backbone.load.load_backbone", "training.opening.load_backbone", "interop.hub.download"):
        monkeypatch.setattr(f"prefixtune.{name}", never)
    monkeypatch.setattr("prefixtune.backbone.packaged.prepare", never)
    paths = {"prefix": tmp_path / "p.safetensors", "run": tmp_path / "run"}
    assert main([word.format(tmp_path / "file", **paths) for word in words]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "error: " in message
    assert str(tmp_path / "file") in message
