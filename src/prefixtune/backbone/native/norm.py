"""Root-mean-square norms by compiled code (`norm.cpp`), where a model's own take eight operations.

For the backward pass they keep their input alone, in its own dtype; the weight, which is frozen, gets no gradient.
"""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future
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

__all__ = ["NormKernel", "RowNorm", "norm_kernel", "norm_of"]

_SAMPLE_ROWS = 8
_UNEQUAL = 0.002
"""Share of numbers that may be rounded otherwise in bfloat16, since squares are added up in another order."""
_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class NormKernel(NativeLibrary):
    """The compiled norm."""

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._norm, self._slopes = (
            {dtype: getattr(library, f"{name}_{suffix}") for dtype, suffix in _NAMES.items()}
            for name in ("rms_norm", "rms_norm_slopes")
        )
        for functions, pointers in ((self._norm, 3), (self._slopes, 4)):
            for function in functions.values():
                numbers = [ctypes.c_int64, ctypes.c_int64, ctypes.c_float, ctypes.c_int64, ctypes.c_int64]
                function.argtypes, function.restype = [*[ctypes.c_void_p] * pointers, *numbers], None

    def computes(self) -> bool:
        """Whether a few rows have the results of torch's norm, and its gradients."""
        for dtype, plus_one in ((torch.bfloat16, False), (torch.float32, True)):
            inputs = torch.linspace(-3, 5, 3 * 50, dtype=torch.float32).view(3, 50).to(dtype)
            weight = torch.linspace(0.5, 2, 50, dtype=torch.float32).to(dtype)
            factor = weight + 1 if plus_one else weight
            if not computes_same(
                lambda rows, weight=weight, plus_one=plus_one: self.apply(rows, weight, 0.01, plus_one),
                lambda rows, factor=factor: F.rms_norm(rows.float(), (50,), factor.float(), 0.01).to(rows.dtype),
                [inputs],
            ):
                return False
        return True

    def __call__(
        self, inputs: Float[Tensor, "*B N"], weight: Float[Tensor, " N"], epsilon: float, plus_one: bool = False
    ) -> Float[Tensor, "*B N"]:
        """The inputs over the root of their mean square, rounded, times the weight.

        Args:
            inputs: The rows, in float32 or bfloat16.
            weight: Of each column, in the same dtype.
            epsilon: Added to the mean square.
            plus_one: Multiply by 1 + weight, in float32, and round once.
        """
        inputs, width = inputs.contiguous(), inputs.shape[-1]
        out = torch.empty_like(inputs)
        pointers = inputs.data_ptr(), weight.data_ptr(), out.data_ptr()
        rows = inputs.numel() // width
        self._norm[inputs.dtype](*pointers, rows, width, epsilon, plus_one, torch.get_num_threads())
        return out

    def apply(self, inputs: Tensor, weight: Tensor, epsilon: float, plus_one: bool = False) -> Tensor:
        """The same; gradients flow through it to the inputs."""
        if torch.is_grad_enabled() and inputs.requires_grad:
            learned: Tensor = _Norm.apply(inputs, weight, self, epsilon, plus_one)  # type: ignore[no-untyped-call]
            return learned
        return self(inputs, weight, epsilon, plus_one)

    def slopes(
        self,
        inputs: Float[Tensor, "*B N"],
        weight: Float[Tensor, " N"],
        slopes: Float[Tensor, "*B N"],
        epsilon: float,
        plus_one: bool = False,
    ) -> Float[Tensor, "*B N"]:
        """The gradient in the inputs, by that in the results."""
        inputs, slopes, width = inputs.contiguous(), slopes.contiguous(), inputs.shape[-1]
        out = torch.empty_like(inputs)
        pointers = inputs.data_ptr(), weight.data_ptr(), slopes.data_ptr(), out.data_ptr()
        rows = inputs.numel() // width
        self._slopes[inputs.dtype](*pointers, rows, width, epsilon, plus_one, torch.get_num_threads())
        return out


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, inputs: Tensor, weight: Tensor, kernel: NormKernel, *how: Any) -> Tensor:
        context.save_for_backward(inputs)
        context.rest = weight, kernel, how
        return kernel(inputs, weight, *how)

    @staticmethod
    @once_differentiable
    def backward(context: Any, slopes: Tensor) -> tuple[Tensor, None, None, None, None]:
        (inputs,), (weight, kernel, how) = context.saved_tensors, context.rest
        return kernel.slopes(inputs, weight, slopes, *how), None, None, None, None


@functools.cache
def norm_kernel() -> Future[NormKernel | None]:
    """The compiled norm, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("norm.cpp"), NormKernel, "norms run")


class RowNorm(nn.Module):
    """A model's norm by compiled code, as soon as that is there and found to compute the same.

    Args:
        norm: The model's, of which the weight is shared.
        epsilon: What it adds to the mean square.
    """

    def __init__(self, norm: Any, epsilon: float) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, epsilon
        self._plain: Any = norm
        self._weight = norm.weight.detach()
        self._kernel: NormKernel | None = None
        self._plus_one = False
        self._tried = False

    def forward(self, inputs: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """The norm."""
        if (
            self._kernel is not None
            and inputs.dtype == self._weight.dtype
            and inputs.is_cpu
            and not torch.compiler.is_compiling()
        ):
            return self._kernel.apply(inputs, self._weight, self.epsilon, self._plus_one)
        if not self._tried and not torch.compiler.is_compiling() and norm_kernel().done():
            self.use_kernel()
        plain: Tensor = self._plain(inputs)
        return plain

    def use_kernel(self) -> bool:
        """Wait for compiled code, and use it if it has the model's results for random rows; returns whether it has."""
        self._tried = True
        kernel = norm_kernel().result()
        if kernel is None:
            return False
        draw = torch.Generator().manual_seed(0)
        inputs = 3 * torch.randn(_SAMPLE_ROWS, len(self._weight), generator=draw)
        # A row of small numbers shows the epsilon.
        inputs = (inputs * torch.logspace(-4, 2, _SAMPLE_ROWS)[:, None]).to(self._weight.dtype)
        for plus_one in (False, True):
            compute = functools.partial(kernel.apply, weight=self._weight, epsilon=self.epsilon, plus_one=plus_one)
            if computes_same(compute, self._plain, [inputs]) and self._rounds_same(compute(inputs), inputs):
                self._kernel, self._plus_one = kernel, plus_one
                break
        return self._kernel is not None

    def _rounds_same(self, found: Tensor, inputs: Tensor) -> bool:
        with torch.no_grad():
            unequal = (self._plain(inputs) != found).float().mean()
        return found.dtype != torch.bfloat16 or float(unequal) <= _UNEQUAL


def norm_of(module: nn.Module) -> RowNorm | None:
    """A norm to be used in a module's place; None: it seems to be none, is trained, or is not on a processor."""
    parameters = dict(module.named_parameters())
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = parameters.get("weight")
    if (
        "Norm" not in type(module).__name__
        or list(parameters) != ["weight"]
        or list(module.children())
        or weight is None
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or (weight.dim(), weight.device.type) != (1, "cpu")
        or weight.dtype not in _NAMES
        or not weight.is_contiguous()
        or not isinstance(epsilon, float)
    ):
        return None
    norm_kernel()
    return RowNorm(module, epsilon)
