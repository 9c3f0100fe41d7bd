"""A training step as every side of a comparison takes it: its time and its peak memory.

Needs no library but torch: a peer imports it in an environment of its own.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bench.machine import peak_memory_mib, reset_peak_memory, resident_mib

BOTTLENECK_SIZE = 512
LEARNING_RATE = 5e-4
MAX_GRAD_NORM = 1.0


class Trained(Protocol):
    """A side of a comparison, as a step needs it."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def backward(self, batch: Any) -> float:
        """Mean loss of the batch's target tokens; adds its gradients to those of the prefix's parameters."""

    def weights(self) -> list[nn.Parameter]:
        """The prefix's parameters; per MLP: embedding, first layer's weight and bias, last layer's weight and bias."""


def make_optimizer(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW with the settings of all sides; fused, as transformers' `Trainer` has it by default."""
    return torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, fused=True)


def step(side: Trained, batch: Any) -> float:
    """One optimizer step; returns its loss."""
    side.optimizer.zero_grad(set_to_none=True)
    loss = side.backward(batch)
    nn.utils.clip_grad_norm_(side.weights(), MAX_GRAD_NORM)
    side.optimizer.step()
    return loss


def timed_step(side: Trained, batch: Any) -> tuple[float, float]:
    """A step's seconds, and its loss."""
    gc.collect()
    began = time.perf_counter()
    loss = step(side, batch)
    return time.perf_counter() - began, loss


def gradients(side: Trained, batch: Any) -> tuple[float, list[Tensor]]:
    """A batch's loss, and its gradient in every parameter of a side; the parameters' own are cleared."""
    side.optimizer.zero_grad(set_to_none=True)
    loss = side.backward(batch)
    copies = [torch.zeros_like(weight) if weight.grad is None else weight.grad.clone() for weight in side.weights()]
    side.optimizer.zero_grad(set_to_none=True)
    return loss, copies


def clone_weights(side: Trained) -> list[Tensor]:
    """A copy of a side's parameters."""
    return [weight.detach().clone() for weight in side.weights()]


@torch.no_grad()
def set_weights(side: Trained, values: Iterable[Tensor]) -> None:
    """Start a side again, with these parameters and an empty optimizer."""
    for weight, value in zip(side.weights(), values, strict=True):
        weight.copy_(value)
    side.optimizer.state.clear()


@torch.no_grad()
def load_pages(model: nn.Module) -> None:
    """Read from every memory page: weights may be mapped from their file, and not loaded yet."""
    for parameter in model.parameters():
        parameter.flatten()[:: 2048 // parameter.element_size()].sum()


def measure_peak(side: Trained, batches: Iterable[Any]) -> dict[str, float | None]:
    """Peak memory of this process over some steps; the process has loaded nothing but the side."""
    load_pages(side.model)
    gc.collect()
    loading = peak_memory_mib() or 0.0
    is_reset = reset_peak_memory()
    # Read after the reset, which gives freed memory back.
    loaded = resident_mib()
    for batch in batches:
        step(side, batch)
        gc.collect()
    steps = peak_memory_mib() or 0.0
    return {
        "peak_mib": max(loading, steps),
        "loading_peak_mib": loading,
        "loaded_mib": loaded,
        "steps_peak_mib": steps if is_reset else None,
        "step_mib": None if loaded is None else steps - loaded,
    }
