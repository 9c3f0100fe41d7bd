"""What commands write to: checked before anything loads, and left as it was by a refused command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.cli.commands.demo import DemoOptions, demo_config
from prefixtune.cli.main import main
from prefixtune.utils.locks import claim_folder

TOY = ["--task", "toy", "--train", "train", "--dev", "held_out", "--test", "held_out"]


class Stopped(Exception):
    pass


def test_a_running_demo_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.toml").write_text(demo_config(DemoOptions()).to_toml())
    (folder / "state.safetensors").write_bytes(b"of the one that runs")
    with claim_folder(folder):
        assert main(["demo", "--output", str(folder), "--quiet"]) == 2
    assert "is in use by" in " ".join(capsys.readouterr().err.split())
    assert (folder / "state.safetensors").read_bytes() == b"of the one that runs"
    # No demo runs there any more; but its files stay until the backbone is there.

    def stopped(*_: Any, **__: Any) -> Any:
        raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("prefixtune.backbone.packaged.prepare", stopped)
        with pytest.raises(Stopped):
            main(["demo", "--output", str(folder), "--quiet"])
    assert (folder / "state.safetensors").read_bytes() == b"of the one that runs"
    # The training finds the folder free.
    for name in ("backbone.packaged.prepare", "backbone.load.load_backbone", "evaluation.evaluate.evaluate"):
        monkeypatch.setattr(f"prefixtune.{name}", lambda *_, **__: None)
    monkeypatch.setattr("prefixtune.cli.commands.demo.run_training", stopped)
    with pytest.raises(Stopped):
        main(["demo", "--output", str(folder), "--quiet"])
    assert not any(folder.iterdir())


@pytest.mark.parametrize("config", [None, b'task = "toy"\n', b"\xff\xfe", b'init_text = "Announce the night train:"'])
def test_a_run_that_no_demo_made_is_kept(
    config: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    if config is not None:
        (tmp_path / "config.toml").write_bytes(config)
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert "holds other files than those of a demo" in " ".join(capsys.readouterr().err.split())
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
    assert "error: cannot write" in message
    assert str(tmp_path / "file") in message
