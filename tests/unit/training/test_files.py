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
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError, ConfigError, DataError, PrefixError
from prefixtune.training.checkpoint import load_state
from prefixtune.utils.locks import claim_folder

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
    with pytest.raises(CheckpointError, match=r"line 2 of '.*events\.jsonl' is no event of a training run") as caught:
        train(resume=True)
    assert "delete the file" in caught.value.hint
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

    monkeypatch.setattr("prefixtune.training.train.load_backbone", never)
    assert main(["train", "--task", "e2e", "--train", str(file), "--output", str(tmp_path / "run"), "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("error: ")


# --- the folder -------------------------------------------------------------------------------------------------------


def test_two_trainings_in_one_folder(
    train: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = """
import sys, time
from pathlib import Path
from prefixtune.utils.locks import claim_folder
with claim_folder(Path(sys.argv[1])):
    print("ready", flush=True)
    time.sleep(600)
"""
    folder = tmp_path / "run"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    other = subprocess.Popen([sys.executable, "-c", code, str(folder)], stdout=subprocess.PIPE, env=environment)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(PrefixError, match=rf"run' is in use by process {other.pid} "):
            train()
        words = ["train", "--train", "missing.csv", "--task", "e2e", "--output", str(folder), "--quiet"]
        assert main(words) == 2
        assert f"'{folder}' is in use by process {other.pid}" in " ".join(capsys.readouterr().err.split())
    finally:
        other.kill()
        other.communicate()
    assert train().steps == 3
    assert not list(folder.glob(".*"))


def test_a_demo_that_runs_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "config.toml").write_text('task = "toy"\n')
    (folder / "state.safetensors").write_bytes(b"of the one that runs")
    with claim_folder(folder):
        assert main(["demo", "--output", str(folder), "--quiet"]) == 2
    assert "is in use by" in " ".join(capsys.readouterr().err.split())
    assert (folder / "state.safetensors").read_bytes() == b"of the one that runs"
    # Nobody runs there any more: they go, and the folder is free for the training.

    def stopped(*_: Any, **__: Any) -> Any:
        raise Stopped

    monkeypatch.setattr("prefixtune.backbone.packaged.prepare", stopped)
    with pytest.raises(Stopped):
        main(["demo", "--output", str(folder), "--quiet"])
    assert not any(folder.iterdir())


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--task", "e2e", "--train", "nowhere.csv", "--output", "{}/r1/r2/r3"],
        ["report", "nowhere", "--output", "{}/new/deep/a.html"],
        ["evaluate", "--task", "e2e", "--data", "nowhere.csv", "--output", "{}/new/scores"],
        ["study", "length", "--task", "e2e", "--data", "nowhere", "--output", "{}/new/study"],
    ],
    ids=lambda words: words[0],
)
def test_a_refused_command_leaves_no_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in words]) == 2
    assert "nowhere" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_more_epochs_than_max_steps_let_in_are_refused(
    train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(3)
    folder = str(tmp_path / "run")

    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError("the backbone is loaded")

    monkeypatch.setattr("prefixtune.training.train.load_backbone", never)
    with pytest.raises(ConfigError, match=r"epochs is 50, but the length of the run in .* is max_steps = 3") as caught:
        pt.train(output=folder, resume=True, epochs=50.0, examples=EXAMPLES)
    assert "--max-steps 0" in caught.value.hint


def test_a_run_set_by_steps_can_be_given_epochs_as_the_hint_says(
    train: Callable[..., Any], backbone: Any, tmp_path: Path
) -> None:
    train(3)
    more = pt.train(
        output=str(tmp_path / "run"), resume=True, max_steps=0, epochs=5.0, backbone=backbone, examples=EXAMPLES
    )
    assert more.steps == 5


def test_a_state_is_read_once(train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:

    train(3)
    load, read = load_state, list[Path]()

    def counted(path: Path) -> Any:
        read.append(path)
        return load(path)

    monkeypatch.setattr("prefixtune.training.checkpoint.load_state", counted)
    assert train(6, resume=True).steps == 6
    assert len(read) == 1


def test_what_is_too_long_to_be_stored_is_refused_before_the_first_step(
    backbone: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state has room for the configuration; the artifact's header has the labels, too."""
    monkeypatch.setattr("prefixtune.prefix.header._HEADER_BYTES", 30_000)
    examples = [pt.Example(f"n : {n}", (f"label {n} " + "a" * 90,), {"label": f"{n}"}) for n in range(300)]
    config = pt.TrainConfig(
        task="classification", classifier="words", prefix_length=2, init_text="ab", output=str(tmp_path / "run")
    )
    events: list[Any] = []
    with pytest.raises(CheckpointError, match=r"the header cannot be stored: it takes .* bytes"):
        pt.train(config, backbone=backbone, examples=examples, on_event=events.append)
    assert events == []


def test_a_training_holds_its_folder_to_its_end(train: Callable[..., Any], tmp_path: Path) -> None:
    tried: list[str] = []

    def on_event(event: Any) -> None:
        with pytest.raises(PrefixError, match="in use") as caught:
            train()
        tried.append(caught.value.message)

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

    for name in ("backbone.load.load_backbone", "training.train.load_backbone", "interop.hub.download"):
        monkeypatch.setattr(f"prefixtune.{name}", never)
    monkeypatch.setattr("prefixtune.backbone.packaged.prepare", never)
    paths = {"prefix": tmp_path / "p.safetensors", "run": tmp_path / "run"}
    assert main([word.format(tmp_path / "file", **paths) for word in words]) == 2
    message = " ".join(capsys.readouterr().err.split())
    assert "error: cannot write" in message
    assert str(tmp_path / "file") in message
