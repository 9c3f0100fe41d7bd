"""Resuming from a state: the options that may change, and that the file is read once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt
from prefixtune.errors import ConfigError
from prefixtune.training.checkpoint import load_state


def test_epochs_that_max_steps_overrides_are_refused(
    train: Callable[..., Any], tmp_path: Path, examples: list[pt.Example], no_backbone_loads: None
) -> None:
    train(3)
    folder = str(tmp_path / "run")

    with pytest.raises(ConfigError, match=r"epochs is 50, but the length of the run in .* is max_steps = 3") as caught:
        pt.train(output=folder, resume=True, epochs=50.0, examples=examples)
    assert "--max-steps 0" in caught.value.hint


def test_a_run_with_max_steps_can_be_resumed_with_epochs_as_the_hint_says(
    train: Callable[..., Any], backbone: Any, examples: list[pt.Example], tmp_path: Path
) -> None:
    train(3)
    more = pt.train(
        output=str(tmp_path / "run"), resume=True, max_steps=0, epochs=5.0, backbone=backbone, examples=examples
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
