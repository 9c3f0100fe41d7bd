"""Runs that train together: their passes, a batch in parts, and a stop."""

import contextlib
import threading

import pytest
import torch

import prefixtune as pt
from patching import replace_everywhere
from prefixtune.training import loop as loop_module
from prefixtune.training import together as group_module
from prefixtune.training.prepare import prepare
from prefixtune.training.together import take_steps


@pytest.fixture
def open_one(backbone, examples, tmp_path):
    """`open_one(name, **fields)`: a run in the folder of that name, open until the test ends."""
    with contextlib.ExitStack() as stack:

        def open_named(name, **fields):
            data = {part: fields.pop(part) for part in ("examples", "dev_examples") if part in fields}
            fields = {"max_steps": 3, "prefix_length": 2, "init_text": "ab", "batch_size": 4, **fields}
            config = pt.TrainConfig(output=str(tmp_path / name), **fields)
            return stack.enter_context(prepare(config, backbone, **{"examples": examples, **data}, resume=True))

        yield open_named


def test_more_runs_take_more_passes_but_no_more_memory(backbone, open_one, monkeypatch):
    own, passes = loop_module.forward_backward, []

    def counted(backbone, steps):
        passes.append(len(steps))
        own(backbone, steps)

    replace_everywhere(monkeypatch, own, counted)
    runs = [open_one(f"run{index}") for index in range(5)]
    batches = next(open_one("measured").loop.remaining_steps())
    most = int(2.5 * batches[0][0].input_ids.numel())
    monkeypatch.setattr(group_module, "positions_at_once", lambda backbone: most)
    events = take_steps(backbone, runs, threading.Event())
    assert next(event for _, event in events if event["event"] == "step")["step"] == 1
    assert passes == [2, 2, 1]


@pytest.mark.parametrize("fields", [{}, {"prefix_dropout": 0.5}, {"nested": True}, {"gradient_accumulation": 2}])
def test_a_large_batch_is_computed_in_parts_with_the_same_gradients(backbone, open_one, monkeypatch, fields):
    # Targets of different lengths: the loss is not the mean of the parts' losses.
    several = [pt.Example(f"n : {letter}", (f"{letter * 9} it is.", f"{letter}.")) for letter in "abcdefgh"]
    loop = open_one("run", batch_size=8, prefix_length=4, examples=several, **fields).loop
    steps, counts = [], []
    for most in (0, 40):
        loop.most_positions = most
        step = loop.prepare(next(loop.remaining_steps()))
        loop_module.forward_backward(backbone, [step])
        assert step.prefix_leaf is not None
        steps.append((step.loss, [tensor.grad for tensor in step.prefix_leaf.stored_tensors()]))
        counts.append([batch.input_ids.numel() for batch in step.batches])
    whole, parts = steps
    assert len(counts[1]) > 2 * len(counts[0])
    assert max(counts[1]) <= 40 < max(counts[0])
    assert parts[0] == pytest.approx(whole[0], rel=1e-6)
    for gradient, expected in zip(parts[1], whole[1], strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_a_stop_saves_all_runs(backbone, open_one):
    stop = threading.Event()
    stop.set()
    events = take_steps(backbone, [open_one("one"), open_one("other")], stop)
    assert [event["event"] for _, event in events] == ["start", "start", "step", "save", "step", "save"]
