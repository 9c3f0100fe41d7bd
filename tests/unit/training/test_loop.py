"""A step: its gradients do not depend on the dtype that the backbone computes in."""

import threading

import pytest
import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.training.distributed import ProcessGroup
from prefixtune.training.loop import forward_backward


class _Ready(Exception):
    pass


class _LargeStep(ProcessGroup):
    """As if other processes had the rest of a step of 100,000 times as many targets."""

    def all_reduce(self, *values):
        return tuple(100_000 * value for value in values)


@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_small_gradients_are_not_lost_in_float16(method, train, tiny_models, tiny_tokenizer):
    def gradient(dtype):
        backbone = Backbone.from_model(tiny_models("llama").to(dtype), tiny_tokenizer, "tiny")
        found = []

        def check(loop):
            loop.processes = _LargeStep()
            step = loop.prepare(next(loop.remaining_steps()))
            forward_backward(loop.backbone, [step])
            loop.apply(step, threading.Event())
            found.append(torch.cat([p.grad.flatten() for p in loop.trained if p.grad is not None]))
            raise _Ready

        with pytest.raises(_Ready):
            train(method=method, backbone=backbone, check=check)
        return found[0]

    exact, half = gradient(torch.float32), gradient(torch.float16)
    assert 0 < float(exact.norm()) < 1e-3
    assert float((half - exact).norm()) < 0.05 * float(exact.norm())
