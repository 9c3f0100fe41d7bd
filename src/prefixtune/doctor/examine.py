"""Does a model carry prefixes correctly? Four comparisons on a few tokens.

A prefix that is ignored raises no error: training goes on, text comes out. So every way in which prefixes are used is
run on the model itself with random prefixes, and compared with the plainest one: a row alone, computed in full.

It runs in float32, where right and wrong are orders of magnitude apart. Some models run in their own dtype, with a
wider tolerance: quantized, spread over devices, on MPS, or so large that a copy would take more than half of the free
memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.attention.layout import Layout, main_device, passes_gradients
from prefixtune.doctor.rows import Rows
from prefixtune.errors import PrefixError, first_line
from prefixtune.utils.machine import free_memory

_GRADIENT = "a gradient reaches every layer's prefix"
_TOLERANCE = 1e-3
_WIDE_TOLERANCE = 1e-2
"""On a GPU, which may round products to TF32; and in steps with a cache where layers keep a state, as some limit their
time steps in a full pass only (Zamba2)."""
_HALF_TOLERANCE = 0.1
"""In half precision. Rounding may send a token to another expert."""
_MOST_BYTES = 2**33
"""Most memory that half-precision weights may take in float32 for the check."""


@dataclass(frozen=True)
class Comparison:
    """Two ways of computing the same rows.

    Attributes:
        name: What should be true.
        difference: How far apart they are, relative to the numbers themselves; of gradients, the share of a prefix's
            key and value slots that get none.
        tolerance: How far apart they may be.
        error: Why one of them could not be computed; the difference is infinite then.
    """

    name: str
    difference: float
    tolerance: float
    error: str = ""

    @property
    def passed(self) -> bool:
        """Whether they agree."""
        return self.difference <= self.tolerance

    def __str__(self) -> str:
        return f"{self.name}: {self.error or f'{self.difference:.1e} apart, at most {self.tolerance:g}'}"


@torch.no_grad()
def examine(model: Any, layout: Layout) -> list[Comparison]:
    """Compare the ways in which prefixes are used on a model, as far as they apply to it; what raises has failed.

    The model, its gradients and the random state are left as they were.

    Args:
        model: The frozen model, probed before.
        layout: What `probe` found.
    """
    device = main_device(model)
    with _in_float32(model, device) as exact:
        tolerance = _HALF_TOLERANCE if not exact else _TOLERANCE if device.type == "cpu" else _WIDE_TOLERANCE
        stateful = layout.kind == "decoder" and not layout.packable
        try:
            rows = Rows(model, layout)
        except Exception as error:
            return [_failed(_GRADIENT, 0.0, error)]
        ways: Mapping[str, tuple[bool, Callable[[], float], float]] = {
            _GRADIENT: (passes_gradients(model), rows.without_gradient, 0.0),
            "padded = alone": (True, rows.padded, tolerance),
            "packed = alone": (layout.packable, rows.packed, tolerance),
            "cached = recomputed": (
                layout.kind != "encoder",
                rows.cached,
                max(tolerance, _WIDE_TOLERANCE) if stateful else tolerance,
            ),
        }
        found = []
        for name, (applies, way, allowed) in ways.items():
            if applies:
                try:
                    found.append(Comparison(name, way(), allowed))
                except Exception as error:
                    found.append(_failed(name, allowed, error))
    return found


def _failed(name: str, tolerance: float, error: Exception) -> Comparison:
    text = error.message if isinstance(error, PrefixError) else f"{type(error).__name__}: {first_line(error)}"
    return Comparison(name, float("inf"), tolerance, text)


@contextlib.contextmanager
def _in_float32(model: nn.Module, device: torch.device) -> Iterator[bool]:
    """While the block runs, half-precision weights are float32; yields whether the model computes in it now."""
    if not computes_exactly(model, device):
        yield False
        return
    half = _half_precision(model)
    stored = [t.data for t in half]
    try:
        for tensor in half:
            tensor.data = tensor.data.float()
        yield True
    finally:
        for tensor, data in zip(half, stored, strict=True):
            tensor.data = data


def computes_exactly(model: nn.Module, device: torch.device) -> bool:
    """Whether a model is examined in float32: it is of that dtype, or there is room for copies of its weights."""
    half = _half_precision(model)
    if not half:
        return True
    # Nobody knows what MPS has left.
    plain = device.type != "mps" and all(type(t) in (Tensor, nn.Parameter) and t.device.type != "meta" for t in half)
    return plain and sum(4 * t.numel() for t in half) <= min(_MOST_BYTES, free_memory(device) // 2)


def _half_precision(model: nn.Module) -> list[Tensor]:
    return [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
