"""Whether a function computes what another one does, gradients included, seen on given inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["computes_same", "near"]

Function = Callable[..., Any]


def near(found: Tensor, expected: Tensor) -> bool:
    """Whether two results differ by no more than their dtype's rounding, row by row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    share = 2**-6 if expected.dtype == torch.bfloat16 else 2**-17
    found, expected = found.detach().double(), expected.detach().double()
    return bool(((found - expected).norm(dim=-1) <= share * expected.norm(dim=-1)).all())


def computes_same(function: Function, expected: Function, inputs: Sequence[Tensor]) -> bool:
    """Whether two functions have the same results and gradients, but for rounding; False if one of them fails.

    Args:
        function: Takes tensors, and returns one or several.
        expected: The other one.
        inputs: What both get.
    """
    try:
        with torch.inference_mode(False), torch.enable_grad():
            pairs = zip(_results(function, inputs), _results(expected, inputs), strict=True)
            return all(near(*pair) for pair in pairs)
    except (RuntimeError, AttributeError, TypeError, ValueError, IndexError):
        return False


def _results(function: Function, inputs: Sequence[Tensor]) -> list[Tensor]:
    """A function's results, and the inputs' gradients of a weighted sum of these."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    results = function(*leaves)
    results = [results] if isinstance(results, Tensor) else list(results)
    draw = torch.Generator().manual_seed(1)
    slopes = [torch.randn(result.shape, generator=draw).to(result.dtype) for result in results]
    return [*results, *torch.autograd.grad(results, leaves, slopes)]
