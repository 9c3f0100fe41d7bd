"""Gated activations, `act(gate) * up`, by compiled code (`gate.cpp`), in the MLPs of LLaMA and many others.

For the backward pass gate and up are kept, and nothing else.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import types
from concurrent.futures import Future
from enum import IntEnum
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefixtune.backbone.native.compare import computes_same
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["Activation", "GateKernel", "gate_kernel", "use_gate"]

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_PARTS = (("gate_proj", "up_proj", "down_proj", "act_fn"), ("wi_0", "wi_1", "wo", "act"))
"""What the parts of a gated MLP are called: the layers of gate, up and down, and the activation."""


class Activation(IntEnum):
    """As in `gate.cpp`."""

    SILU = 0
    GELU_TANH = 1


class GateKernel(NativeLibrary):
    """The compiled activations."""

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._gate, self._slopes = (
            {dtype: getattr(library, f"{name}_{suffix}") for dtype, suffix in _NAMES.items()}
            for name in ("gate", "gate_slopes")
        )
        for functions, pointers in ((self._gate, 3), (self._slopes, 5)):
            for function in functions.values():
                function.argtypes = [*[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * 4]
                function.restype = None

    def computes(self) -> bool:
        """Whether a few rows have the results of torch's functions, and their gradients."""
        plain = {Activation.SILU: F.silu, Activation.GELU_TANH: functools.partial(F.gelu, approximate="tanh")}
        gate = torch.linspace(-30, 40, 150, dtype=torch.float32).view(50, 3).T
        return all(
            computes_same(
                functools.partial(self.apply, activation=activation),
                lambda gate, up, act=act: (act(gate.float()) * up.float()).to(gate.dtype),
                [gate.to(dtype), gate.flip(0, 1).to(dtype)],
            )
            for activation, act in plain.items()
            for dtype in _NAMES
        )

    def supports(self, gate: Tensor, up: Tensor) -> bool:
        """Whether it computes these."""
        return gate.dtype in _NAMES and gate.dtype == up.dtype and gate.shape == up.shape and gate.is_cpu and up.is_cpu

    def apply(
        self, gate: Float[Tensor, "*B N"], up: Float[Tensor, "*B N"], activation: Activation
    ) -> Float[Tensor, "*B N"]:
        """The activation of the gate, times `up`; gradients flow through it."""
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            learned: Tensor = _Gate.apply(gate, up, activation, self)  # type: ignore[no-untyped-call]
            return learned
        return self.compute(gate, up, activation)

    def compute(self, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        """`apply` without gradients."""
        gate, up, width = gate.contiguous(), up.contiguous(), gate.shape[-1]
        out = torch.empty_like(gate)
        pointers = gate.data_ptr(), up.data_ptr(), out.data_ptr()
        self._gate[gate.dtype](*pointers, gate.numel() // width, width, activation, torch.get_num_threads())
        return out

    def slopes(self, gate: Tensor, up: Tensor, slopes: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
        """The gradients in gate and up, by that in the result."""
        gate, up, slopes, width = gate.contiguous(), up.contiguous(), slopes.contiguous(), gate.shape[-1]
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        pointers = [tensor.data_ptr() for tensor in (gate, up, slopes, of_gate, of_up)]
        self._slopes[gate.dtype](*pointers, gate.numel() // width, width, activation, torch.get_num_threads())
        return of_gate, of_up


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, gate: Tensor, up: Tensor, activation: Activation, kernel: GateKernel) -> Tensor:
        context.save_for_backward(gate, up)
        context.rest = activation, kernel
        return kernel.compute(gate, up, activation)

    @staticmethod
    @once_differentiable
    def backward(context: Any, slopes: Tensor) -> tuple[Tensor, Tensor, None, None]:
        activation, kernel = context.rest
        return *kernel.slopes(*context.saved_tensors, slopes, activation), None, None


@functools.cache
def gate_kernel() -> Future[GateKernel | None]:
    """The compiled activations, as soon as they are made; None: they cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("gate.cpp"), GateKernel, "activations run")


def use_gate(module: nn.Module, kernel: GateKernel) -> bool:
    """Let a model's gated MLP use compiled code; returns whether it does.

    It stays as it is if it is another module, or computes something else for random rows.
    """
    names = next((names for names in _PARTS if all(hasattr(module, name) for name in names)), None)
    plain = type(module).forward
    if names is None or "forward" in vars(module) or len(inspect.signature(plain).parameters) != 2:
        return False
    gate_name, up_name, down_name, act_name = names
    activation = _activation(getattr(module, act_name), kernel)
    if activation is None:
        return False

    def forward(self: Any, inputs: Tensor) -> Tensor:
        gate, up = getattr(self, gate_name)(inputs), getattr(self, up_name)(inputs)
        if not kernel.supports(gate, up):
            other: Tensor = plain(self, inputs)
            return other
        down: Tensor = getattr(self, down_name)(kernel.apply(gate, up, activation))
        return down

    weight = getattr(module, gate_name).weight
    inputs = torch.randn(2, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    if not computes_same(functools.partial(forward, module), functools.partial(plain, module), [inputs]):
        return False
    module.forward = types.MethodType(forward, module)
    return True


def _activation(function: Any, kernel: GateKernel) -> Activation | None:
    """Which of the compiled activations a model's is."""
    gate, up = torch.linspace(-12, 12, 600, dtype=torch.float32).view(100, 6).T, torch.ones(6, 100, dtype=torch.float32)
    for activation in Activation:
        if computes_same(
            functools.partial(kernel.apply, activation=activation), lambda gate, up: function(gate) * up, [gate, up]
        ):
            return activation
    return None
