"""Products of one or two rows with a matrix by compiled code (`linear.cpp`), which reads it at memory's speed."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["MOST_ROWS", "RowKernel", "RowMatrix", "row_kernel"]

MOST_ROWS = 2
"""For more rows, torch's own products are as fast."""
_FUNCTIONS = {torch.bfloat16: "linear_bfloat16", torch.int8: "linear_int8"}


class _Matrix(ctypes.Structure):
    """As in `linear.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "scales", "bias")),
        *((name, ctypes.c_int64) for name in ("outer", "inner")),
    ]


class RowMatrix:
    """A linear layer's weight and bias, ready for `RowKernel.multiply`.

    Args:
        weight: In bfloat16, or int8 with `scales`.
        bias: In bfloat16; None: there is none.
        scales: What each row of an int8 weight is multiplied by, in float32.
    """

    def __init__(
        self,
        weight: Float[Tensor, "N K"] | Tensor,
        bias: Float[Tensor, " N"] | None = None,
        scales: Float[Tensor, " N"] | None = None,
    ) -> None:
        self.kept = weight, bias, scales
        self.dtype, (self.outer, self.inner) = weight.dtype, weight.shape
        self.matrix = _Matrix(
            weight.data_ptr(),
            None if scales is None else scales.data_ptr(),
            None if bias is None else bias.data_ptr(),
            self.outer,
            self.inner,
        )
        self.pointer = ctypes.byref(self.matrix)

    @staticmethod
    def suits(weight: Tensor, bias: Tensor | None = None, scales: Tensor | None = None) -> bool:
        """Whether these can be read as they lie in memory."""
        quantized = scales is not None and weight.dtype == torch.int8 and scales.dtype == torch.float32
        tensors = [tensor for tensor in (weight, bias, scales) if tensor is not None]
        return (
            (quantized or (scales is None and weight.dtype == torch.bfloat16))
            and (bias is None or bias.dtype == torch.bfloat16)
            and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in tensors)
            and all(tensor.device.type == "cpu" and tensor.is_contiguous() for tensor in tensors)
        )


class RowKernel(NativeLibrary):
    """The compiled products."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {"linear_matrix_size": _Matrix}

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._functions = {}
        for dtype, name in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
            function.restype = ctypes.c_int
            self._functions[dtype] = function

    def computes(self) -> bool:
        """Whether small cases have the results of torch's products."""
        draw = torch.Generator().manual_seed(0)
        inputs = torch.randn(2, 150, generator=draw, dtype=torch.float32).to(torch.bfloat16)
        weight = torch.randn(300, 150, generator=draw, dtype=torch.float32)
        bias = torch.randn(300, generator=draw, dtype=torch.float32).to(torch.bfloat16)
        rounded, scales = (
            (weight * 40).round().clamp(-127, 127).to(torch.int8),
            torch.rand(300, generator=draw, dtype=torch.float32),
        )
        cases = (
            (RowMatrix(weight.to(torch.bfloat16), bias), weight.to(torch.bfloat16).float()),
            (RowMatrix(rounded, bias, scales), rounded.float() * scales[:, None]),
        )
        for matrix, plain in cases:
            expected = F.linear(inputs.float(), plain, bias.float())
            if not torch.allclose(self.multiply(inputs, matrix).float(), expected, rtol=0.01, atol=0.01):
                return False
        return True

    def multiply(self, inputs: Float[Tensor, "*B K"], matrix: RowMatrix) -> Float[Tensor, "*B N"]:
        """The product with the matrix, and the bias.

        Args:
            inputs: In bfloat16, of at most `MOST_ROWS` rows.
            matrix: The matrix; its tensors may have changed since, but not moved.

        Raises:
            MemoryError: There is not enough.
        """
        inputs = inputs.contiguous()
        out = torch.empty(*inputs.shape[:-1], matrix.outer, dtype=torch.bfloat16)
        rows = inputs.numel() // matrix.inner
        function, threads = self._functions[matrix.dtype], torch.get_num_threads()
        if rows and function(matrix.pointer, inputs.data_ptr(), out.data_ptr(), rows, threads):
            raise MemoryError("a product had not enough memory.")
        return out


@functools.cache
def row_kernel() -> Future[RowKernel | None]:
    """The compiled products, as soon as they are made; None: they cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("linear.cpp"), RowKernel, "products of single rows run")
