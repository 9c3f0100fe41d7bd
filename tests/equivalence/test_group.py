"""A run in a group that others join and leave takes the steps that it takes alone."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixtune as pt
from prefixtune.training.prepare import prepare
from prefixtune.training.together import RunGroup

EXAMPLES = [pt.Example(f"n : {letter}", (f"{letter} it is.", f"it is {letter * 3}.")) for letter in "abcdef"]
DEV = [pt.Example("n : z", ("z it is.",))]
STEPS = 6


@pytest.fixture
def config_for(tmp_path: Path) -> Callable[..., pt.TrainConfig]:
    def make(name: str, **fields: Any) -> pt.TrainConfig:
        usual = {"prefix_length": 3, "init_text": "ab", "max_steps": STEPS, "batch_size": 4, "warmup_steps": 2}
        return pt.TrainConfig(output=str(tmp_path / name), **{**usual, **fields})

    return make


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_one_that_joins_late_and_is_moved_between_groups(
    family: str, tiny_backbone: Callable[..., Any], config_for: Callable[..., pt.TrainConfig]
) -> None:
    """It joins one that trains, leaves with its state, and goes on beside another that joins later."""
    backbone = tiny_backbone(family)
    alone = pt.train(config_for("alone", seed=3), backbone=backbone, examples=EXAMPLES, dev_examples=DEV)
    mine = config_for("mine", seed=3)
    losses: list[float] = []

    def step(group: RunGroup) -> None:
        for run, event in group.step(threading.Event()):
            run.record(event)
            if run.loop.config.output == mine.output and event["event"] == "step":
                losses.append(event["loss"])

    with contextlib.ExitStack() as stack:

        def join(group: RunGroup, config: pt.TrainConfig) -> Any:
            run = stack.enter_context(prepare(config, backbone, EXAMPLES, DEV, resume=True))
            group.add(run)
            return run

        group = RunGroup(backbone)
        join(group, config_for("first", prefix_length=5, batch_size=2, max_steps=4))
        step(group)
        with prepare(mine, backbone, EXAMPLES, DEV, resume=True) as run:
            group.add(run)
            step(group)
            step(group)
            run.loop.save()
            group.remove(run)
        step(group)

        other = RunGroup(backbone)
        join(other, mine)
        step(other)
        join(other, config_for("last", prefix_length=1, initialization="random", reparameterization="mlp"))
        while other.runs:
            step(other)
    assert losses == pytest.approx([e["loss"] for e in alone.events if e["event"] == "step"], rel=2e-5)
    assert alone.prefix is not None
    trained = pt.load_prefix(Path(mine.output) / "prefix.safetensors")
    for one, another in zip(trained.tensors(), alone.prefix.tensors(), strict=True):
        assert torch.allclose(one, another, rtol=1e-3, atol=1e-4)
