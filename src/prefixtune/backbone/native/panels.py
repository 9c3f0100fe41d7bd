"""Products of any number of rows with a bfloat16 matrix by compiled code (`panels.cpp`), for which it is laid out once.

For processors with AVX-512's products of bfloat16, but without AMX, which torch's own products (oneDNN) use: with a few
rows these take nearly as long as with 32.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["SOURCE", "PanelKernel", "PanelMatrix", "panel_kernel"]

SOURCE = Path(__file__).with_name("panels.cpp")
_WIDTH = 16
_SECONDS = 30.0
"""Longest wait for the compiler."""


class _Product(ctypes.Structure):
    """As in `panels.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("inputs", "panels", "bias", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "outer", "inner", "threads")),
    ]


class PanelKernel(NativeLibrary):
    """The compiled products."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {"panels_product_size": _Product}

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self.pack, self.multiply = library.panels_pack, library.panels_multiply
        self.pack.argtypes = [ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p]
        self.multiply.argtypes = [ctypes.c_void_p]
        self.pack.restype = self.multiply.restype = None

    def computes(self) -> bool:
        """Whether small cases have the results of torch's products."""
        draw = torch.Generator().manual_seed(0)
        for rows, outer in ((1, 40), (19, 50), (70, 300)):
            inputs, weight, bias = (
                torch.randn(shape, generator=draw).to(torch.bfloat16) for shape in ((rows, 150), (outer, 150), (outer,))
            )
            expected = F.linear(inputs.float(), weight.float(), bias.float())
            found = PanelMatrix(self, weight, bias).multiply(inputs)
            if not torch.allclose(found.float(), expected, rtol=0.01, atol=0.01):
                return False
        return True


class PanelMatrix:
    """A linear layer's weight, laid out in panels, and its bias.

    Args:
        kernel: The compiled products.
        weight: In bfloat16, in any order; it is copied.
        bias: In bfloat16; None: there is none.

    Attributes:
        panels: The weight, laid out.
        bias: What is added to each row of a product; None: nothing.
    """

    def __init__(
        self, kernel: PanelKernel, weight: Float[Tensor, "N K"], bias: Float[Tensor, " N"] | None = None
    ) -> None:
        self._multiply, self.bias = kernel.multiply, bias
        self.outer, self.inner = weight.shape
        rows = -(-self.outer // _WIDTH) * _WIDTH
        self.panels = torch.empty(rows, self.inner, dtype=torch.bfloat16)
        sizes = *weight.stride(), *weight.shape, torch.get_num_threads()
        kernel.pack(weight.data_ptr(), *sizes, self.panels.data_ptr())

    @staticmethod
    def suits(weight: Tensor, bias: Tensor | None = None) -> bool:
        """Whether these can be laid out."""
        return all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype == torch.bfloat16
            and tensor.device.type == "cpu"
            and (tensor is weight or tensor.is_contiguous())
            for tensor in (weight, bias)
            if tensor is not None
        ) and (weight.shape[1] % 2 == 0 and weight.numel() > 0)

    def multiply(self, inputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The product with the matrix, and the bias.

        Raises:
            TypeError: The inputs are not in bfloat16.
        """
        if inputs.dtype != torch.bfloat16 or inputs.shape[-1] != self.inner:
            raise TypeError(
                f"inputs of {inputs.dtype}, {tuple(inputs.shape)}, for a matrix of {self.inner} in bfloat16."
            )
        inputs = inputs.contiguous()
        out = torch.empty(*inputs.shape[:-1], self.outer, dtype=torch.bfloat16)
        rows = inputs.numel() // self.inner
        if rows:
            bias = None if self.bias is None else self.bias.data_ptr()
            pointers = inputs.data_ptr(), self.panels.data_ptr(), bias, out.data_ptr()
            product = _Product(*pointers, rows, self.outer, self.inner, torch.get_num_threads())
            self._multiply(ctypes.byref(product))
        return out


def panel_kernel() -> PanelKernel | None:
    """The compiled products, for which it waits; None: the processor gains nothing, or they cannot be made here."""
    if not _gains():
        return None
    try:
        return _start().result(_SECONDS)
    except TimeoutError:
        return None


@functools.cache
def _gains() -> bool:
    if sys.platform != "linux":
        return False
    flags = set(Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split())
    return {"avx512_bf16", "avx512bw", "avx512vl"} <= flags and "amx_bf16" not in flags


@functools.cache
def _start() -> Future[PanelKernel | None]:
    return start(SOURCE, PanelKernel, "products of several rows run")
