"""Products of any number of rows with a matrix by compiled code (`panels.cpp`), for which it is laid out once.

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

__all__ = ["SOURCE", "MatrixArguments", "PanelKernel", "PanelMatrix", "panel_kernel"]

SOURCE = Path(__file__).with_name("panels.cpp")
_WIDTH = 16
_SECONDS = 30.0
"""Longest wait for the compiler."""


class MatrixArguments(ctypes.Structure):
    """A matrix in panels; as in `panels.h`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("panels", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("outer", "inner")),
    ]

    @classmethod
    def of(cls, matrix: PanelMatrix) -> MatrixArguments:
        """Points to a matrix, which must be kept meanwhile."""
        optional = (None if tensor is None else tensor.data_ptr() for tensor in (matrix.scales, matrix.bias))
        return cls(matrix.panels.data_ptr(), *optional, matrix.outer, matrix.inner)


class _Product(ctypes.Structure):
    """As in `panels.cpp`."""

    _fields_ = [
        ("matrix", MatrixArguments),
        *((name, ctypes.c_void_p) for name in ("inputs", "out")),
        *((name, ctypes.c_int64) for name in ("rows", "threads")),
    ]


class PanelKernel(NativeLibrary):
    """The compiled products."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {"panels_product_size": _Product}

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self.pack = {torch.bfloat16: library.panels_pack_bfloat16, torch.int8: library.panels_pack_int8}
        for pack in self.pack.values():
            pack.argtypes, pack.restype = [ctypes.c_void_p, *[ctypes.c_int64] * 5, ctypes.c_void_p], None
        self.multiply = library.panels_multiply
        self.multiply.argtypes, self.multiply.restype = [ctypes.c_void_p], ctypes.c_int

    def computes(self) -> bool:
        """Whether small cases have the results of torch's products."""
        draw = torch.Generator().manual_seed(0)
        for rows, outer in ((1, 40), (19, 50), (70, 300)):
            inputs, weight, bias = (
                torch.randn(shape, generator=draw, dtype=torch.float32).bfloat16()
                for shape in ((rows, 150), (outer, 150), (outer,))
            )
            numbers, scales = (
                (weight * 40).round().clamp(-127, 127).to(torch.int8),
                torch.rand(outer, generator=draw, dtype=torch.float32),
            )
            cases = (
                (PanelMatrix(self, weight, bias), weight.float()),
                (PanelMatrix(self, numbers, bias, scales), numbers.float() * scales[:, None]),
            )
            for matrix, plain in cases:
                expected = F.linear(inputs.float(), plain, bias.float())
                if not torch.allclose(matrix.multiply(inputs).float(), expected, rtol=0.01, atol=0.01):
                    return False
        return True


class PanelMatrix:
    """A linear layer's weight, laid out in panels, and its bias.

    Args:
        kernel: The compiled products.
        weight: In bfloat16, in any order, or int8 with `scales`; it is copied.
        bias: In bfloat16; None: there is none.
        scales: What each row of an int8 weight is multiplied by, in float32.

    Attributes:
        panels: The weight, laid out.
        bias: What is added to each row of a product; None: nothing.
        scales: What each column of a product is multiplied by; None: nothing.
    """

    def __init__(
        self,
        kernel: PanelKernel,
        weight: Float[Tensor, "N K"] | Tensor,
        bias: Float[Tensor, " N"] | None = None,
        scales: Float[Tensor, " N"] | None = None,
    ) -> None:
        self._multiply, self.bias, self.scales = kernel.multiply, bias, scales
        self.outer, self.inner = weight.shape
        rows = -(-self.outer // _WIDTH) * _WIDTH
        self.panels = torch.empty(rows, self.inner, dtype=weight.dtype)
        sizes = *weight.stride(), *weight.shape, torch.get_num_threads()
        kernel.pack[weight.dtype](weight.data_ptr(), *sizes, self.panels.data_ptr())

    @staticmethod
    def suits(weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> bool:
        """Whether these can be laid out."""
        dtypes = ((weight, torch.bfloat16 if scales is None else torch.int8), (bias, torch.bfloat16))
        return all(
            type(tensor) in (Tensor, torch.nn.Parameter)
            and tensor.dtype == dtype
            and tensor.device.type == "cpu"
            and (tensor is weight or tensor.is_contiguous())
            for tensor, dtype in (*dtypes, (scales, torch.float32))
            if tensor is not None
        ) and (weight.shape[1] % 2 == 0 and weight.numel() > 0)

    def multiply(self, inputs: Float[Tensor, "*B K"]) -> Float[Tensor, "*B N"]:
        """The product with the matrix, and the bias.

        Raises:
            TypeError: The inputs are not in bfloat16.
            MemoryError: There is not enough.
        """
        if inputs.dtype != torch.bfloat16 or inputs.shape[-1] != self.inner:
            raise TypeError(
                f"inputs of {inputs.dtype}, {tuple(inputs.shape)}, for a matrix of {self.inner} in bfloat16."
            )
        inputs = inputs.contiguous()
        out = torch.empty(*inputs.shape[:-1], self.outer, dtype=torch.bfloat16)
        rows = inputs.numel() // self.inner
        if rows:
            matrix, threads = MatrixArguments.of(self), torch.get_num_threads()
            product = _Product(matrix, inputs.data_ptr(), out.data_ptr(), rows, threads)
            if self._multiply(ctypes.byref(product)):
                raise MemoryError("a product had not enough memory.")
        return out


def panel_kernel(wait: float = _SECONDS) -> PanelKernel | None:
    """The compiled products; None: the processor gains nothing, or they cannot be made here, or not yet.

    The first call starts to make them, beside the caller.

    Args:
        wait: Most seconds to wait for them.
    """
    if not _gains():
        return None
    try:
        return _start().result(wait)
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
