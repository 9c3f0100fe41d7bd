"""Training from a text, whole and compacted: the artifact, and resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.data import Example
from prefixtune.errors import DataError
from prefixtune.training.config import TrainConfig
from prefixtune.training.train import train

EXAMPLES = [Example(f"name : {name}", (f"It is {name}.",)) for name in ("Ann", "Bob", "Eve", "Kim")]
TEXT = "Say what the name is, in one line."


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("length", "positions"), [(0, len(TEXT)), (6, 6)])
def test_a_run_from_a_text_learns_and_resumes(
    length: int,
    positions: int,
    tmp_path: Path,
    config_for: Callable[..., TrainConfig],
    tiny_backbone: Callable[..., Any],
):
    path = tmp_path / "prompt.txt"
    path.write_text(TEXT, encoding="utf-8")
    backbone = tiny_backbone("llama")
    options = {
        "initialization": "text",
        "init_text": f"@{path}",
        "prefix_length": length,
        "reparameterization": "scaled",
    }
    result = train(config_for(**options), backbone=backbone, examples=EXAMPLES)
    losses = [event["loss"] for event in result.events if "loss" in event]
    assert losses[-1] < losses[0]
    assert result.prefix is not None
    assert result.prefix.prefix_length == positions
    assert result.prefix.header["initialization"]["file"] == "prompt.txt"
    assert result.prefix.header["initialization"]["tokens"] == len(TEXT)

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "save" and event["step"] == 3:
            raise Stopped

    half = config_for("half", **options)
    with pytest.raises(Stopped):
        train(half, backbone=backbone, examples=EXAMPLES, on_event=stop)
    resumed = train(half, backbone=backbone, examples=EXAMPLES, resume=True)
    assert resumed.prefix.equal(result.prefix)


def test_a_missing_file_stops_before_anything_is_written(
    tmp_path: Path, config_for: Callable[..., TrainConfig], tiny_backbone: Callable[..., Any]
):
    config = config_for(initialization="text", init_text=f"@{tmp_path / 'none.txt'}")
    with pytest.raises(DataError, match=r"none\.txt does not exist"):
        train(config, backbone=tiny_backbone("llama"), examples=EXAMPLES)
    assert not (Path(config.output) / "config.toml").exists()
