"""A training's folder: damaged logs, full disks, two trainings at once, and data that teaches nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.cli import main
from prefixtune.errors import CheckpointError, DataError, PrefixError
from prefixtune.files import claim_folder

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.",)) for letter in "abcd"]


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone("llama")


@pytest.fixture
def train(backbone: Any, tmp_path: Path) -> Callable[..., Any]:
    def run(steps: int = 3, *, resume: bool = False, examples: Any = EXAMPLES, **more: Any) -> Any:
        config = pt.TrainConfig(
            prefix_length=2, init_text="ab", max_steps=steps, save_every=1, batch_size=4, output=str(tmp_path / "run")
        )
        return pt.train(config, backbone=backbone, examples=examples, resume=resume, **more)

    return run


TOY = ["--task", "toy", "--train", "train", "--dev", "held_out", "--test", "held_out"]


class Stopped(Exception):
    pass


def stop_after(step: int) -> Callable[[Any], None]:
    def on_event(event: Any) -> None:
        if event["event"] == "save" and event["step"] == step:
            raise Stopped

    return on_event


# --- the log ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tail", [b"", b'{"event": "st', b"\x00" * 700, b"\xff\xfe", b"{", b"[1]", b"3"])
def test_a_torn_last_line_is_left_out(tail: bytes, train: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    with pytest.raises(Stopped):
        train(on_event=stop_after(2))
    log.write_bytes(log.read_bytes() + tail)
    result = train(resume=True)
    steps = [event["step"] for event in result.events if event["event"] == "step"]
    assert steps == [1, 2, 3]
    assert [json.loads(line)["event"] for line in log.read_text().splitlines()].count("step") == 3


@pytest.mark.parametrize(
    "line",
    [
        b"\x00\xff\xfe",
        b"[]",
        b"3",
        b'"step"',
        b"{}",
        b'{"event": 3, "step": "two"}',
        b'{"event": "step", "step": []}',
        b"[" * 100_000,
        b"",
    ],
)
def test_a_damaged_log_is_named_with_a_way_out(line: bytes, train: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    with pytest.raises(Stopped):
        train(on_event=stop_after(2))
    first, *rest = log.read_bytes().split(b"\n")
    log.write_bytes(b"\n".join([first, line, *rest]))
    with pytest.raises(CheckpointError, match=r"line 2 of '.*events\.jsonl' is no event") as told:
        train(resume=True)
    assert "delete the file" in told.value.hint
    log.unlink()
    # As the hint says.
    assert [event["step"] for event in train(resume=True).events if event["event"] == "step"] == [3]


def test_an_empty_log_is_gone_on_with(train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        train(on_event=stop_after(2))
    (tmp_path / "run" / "events.jsonl").write_bytes(b"")
    assert train(resume=True).steps == 3


def test_a_log_that_cannot_be_read_or_written(train: Callable[..., Any], tmp_path: Path) -> None:
    log = tmp_path / "run" / "events.jsonl"
    with pytest.raises(Stopped):
        train(on_event=stop_after(2))
    log.unlink()
    log.mkdir()
    with pytest.raises(CheckpointError, match=r"cannot read '.*events\.jsonl': Is a directory"):
        train(resume=True)
    log.rmdir()
    assert train(resume=True).steps == 3


# --- data without a target --------------------------------------------------------------------------------------------


def test_data_without_a_target_is_refused_before_the_backbone_loads(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = [pt.Example("a", ()), pt.Example("b", ())]
    with pytest.raises(DataError, match="the training data has 2 examples, and none has a target"):
        train(examples=bare)
    with pytest.raises(DataError, match="the development data has 2 examples, and none has a target"):
        train(dev_examples=bare)
    assert not (tmp_path / "run").exists()
    file = tmp_path / "bare.csv"
    file.write_text("mr,ref\nname[Aromi],\n")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the backbone is loaded")

    monkeypatch.setattr("prefixtune.training.load_backbone", never)
    assert main(["train", "--task", "e2e", "--train", str(file), "--output", str(tmp_path / "run"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_two_trainings_in_one_folder(
    train: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import sys, time
from pathlib import Path
from prefixtune.files import claim_folder
with claim_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""
    folder = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=environment)
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(PrefixError, match=rf"run' is in use by process {other.pid} "):
        train()
    words = ["train", "--train", "missing.csv", "--task", "e2e", "--output", str(folder), "--quiet"]
    assert main(words) == 2
    assert f"'{folder}' is in use by process {other.pid}" in " ".join(capsys.readouterr().err.split())
    other.kill()
    other.communicate()
    assert train().steps == 3
    assert not list(folder.glob(".*"))


def test_a_training_holds_its_folder_to_its_end(train: Callable[..., Any], tmp_path: Path) -> None:
    tried: list[str] = []

    def on_event(event: Any) -> None:
        with pytest.raises(PrefixError, match="in use") as told:
            train()
        tried.append(told.value.message)

    train(on_event=on_event)
    assert len(tried) > 3
    with claim_folder(tmp_path / "run"):
        pass


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
        ["study", "length", *TOY, "--sizes", "0", "--output", "{}/study"],
        ["pull", "me/prefix", "{}/p.safetensors"],
        ["report", "{run}", "--output", "{}/report.html"],
    ],
    ids=lambda words: words[0],
)
def test_an_output_that_cannot_be_written_is_said_before_anything_loads(
    words: list[str],
    train: Callable[..., Any],
    backbone: Any,
    random_prefix: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    prefix = pt.Prefix(random_prefix(backbone, 2).layers, {"backbone": {"name": "none"}, "task": "toy"})
    pt.save_prefix(tmp_path / "p.safetensors", prefix)
    if "{run}" in words:
        train()
        capsys.readouterr()

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("something is loaded")

    for name in ("backbone.load_backbone", "training.load_backbone", "interop.hub.download"):
        monkeypatch.setattr(f"prefixtune.{name}", never)
    monkeypatch.setattr("prefixtune.pretrained.prepare", never)
    places = {"prefix": tmp_path / "p.safetensors", "run": tmp_path / "run"}
    assert main([word.format(tmp_path / "file", **places) for word in words]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "error: cannot write" in told
    assert str(tmp_path / "file") in told
