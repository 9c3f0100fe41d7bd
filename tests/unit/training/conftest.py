"""A small training run, to stop, damage and resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune as pt


class _Stopped(Exception):
    pass


@pytest.fixture
def backbone(tiny_backbone: Callable[..., Any]) -> Any:
    return tiny_backbone("llama")


@pytest.fixture
def examples() -> list[pt.Example]:
    return [pt.Example(f"n : {letter}", (f"{letter}{letter} it is.",)) for letter in "abcd"]


@pytest.fixture
def train(backbone: Any, examples: list[pt.Example], tmp_path: Path) -> Callable[..., Any]:
    """`train(steps, resume=False, **arguments)`: a run in the folder `run`; fields of `TrainConfig` change it."""
    usual = examples

    def run(steps: int = 3, *, resume: bool = False, examples: Any = usual, **more: Any) -> Any:
        config = pt.TrainConfig(
            prefix_length=2, init_text="ab", max_steps=steps, save_every=1, batch_size=4, output=str(tmp_path / "run")
        )
        fields = {
            name: more.pop(name) for name in list(more) if name in pt.TrainConfig.model_fields and name != "backbone"
        }
        arguments = {"backbone": backbone, "examples": examples, "resume": resume, **more}
        return pt.train(config.replace(**fields), **arguments)

    return run


@pytest.fixture
def train_until(train: Callable[..., Any]) -> Callable[..., None]:
    """`train_until(step, ...)`: the run of `train(...)`, ended right after it has saved its state at that step."""

    def run(step: int, *arguments: Any, **fields: Any) -> None:
        def on_event(event: Any) -> None:
            if event["event"] == "save" and event["step"] == step:
                raise _Stopped

        with pytest.raises(_Stopped):
            train(*arguments, on_event=on_event, **fields)

    return run


@pytest.fixture
def no_backbone_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("the backbone is loaded")

    monkeypatch.setattr("prefixtune.training.prepare.load_backbone", load)
