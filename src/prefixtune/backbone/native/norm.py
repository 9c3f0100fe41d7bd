"""Root-mean-square norms by compiled code (`norm.cpp`): in bfloat16, where a model's own take eight operations."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["NormKernel", "RowNorm", "norm_kernel", "norm_of"]

_SAMPLE_ROWS = 8
_UNEQUAL = 0.002
"""Share of numbers that may be rounded otherwise, since squares are added up in another order."""


class NormKernel(NativeLibrary):
    """The compiled norm."""

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._function = library.rms_norm
        self._function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float, ctypes.c_int64]
        self._function.restype = None

    def computes(self) -> bool:
        """Whether a few rows have the results of torch's norm."""
        inputs = torch.linspace(-3, 5, 3 * 50).view(3, 50).to(torch.bfloat16)
        weight = torch.linspace(0.5, 2, 50).to(torch.bfloat16)
        expected = F.rms_norm(inputs.float(), (50,), weight.float(), 0.01)
        return torch.allclose(self(inputs, weight, 0.01).float(), expected, rtol=0.02)

    def __call__(self, inputs: Float[Tensor, "*B N"], weight: Float[Tensor, " N"], epsilon: float) -> Tensor:
        """The inputs over the root of their mean square, rounded, times the weight; all in bfloat16.

        Args:
            inputs: The rows.
            weight: Of each column.
            epsilon: Added to the mean square.
        """
        inputs, width = inputs.contiguous(), inputs.shape[-1]
        out = torch.empty_like(inputs)
        rows, threads = inputs.numel() // width, torch.get_num_threads()
        self._function(inputs.data_ptr(), weight.data_ptr(), out.data_ptr(), rows, width, epsilon, threads)
        return out


@functools.cache
def norm_kernel() -> Future[NormKernel | None]:
    """The compiled norm, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("norm.cpp"), NormKernel, "norms run")


class RowNorm(nn.Module):
    """A model's norm for inference, by compiled code as soon as that is there and found to compute the same.

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
        self._settled = False

    def forward(self, inputs: Float[Tensor, "*B N"]) -> Float[Tensor, "*B N"]:
        """The norm."""
        if self._kernel is not None and inputs.dtype == torch.bfloat16 and not torch.compiler.is_compiling():
            return self._kernel(inputs, self._weight, self.epsilon)
        if not self._settled and not torch.compiler.is_compiling() and norm_kernel().done():
            self._settle(norm_kernel().result())
        plain: Tensor = self._plain(inputs)
        return plain

    def _settle(self, kernel: NormKernel | None) -> None:
        """Use compiled code if it has the results of the model's own norm for random rows."""
        self._settled = True
        if kernel is None:
            return
        draw = torch.Generator().manual_seed(0)
        inputs = 3 * torch.randn(_SAMPLE_ROWS, len(self._weight), generator=draw)
        # A row of small numbers shows the epsilon.
        inputs = (inputs * torch.logspace(-4, 2, _SAMPLE_ROWS)[:, None]).to(torch.bfloat16)
        plain, found = self._plain(inputs), kernel(inputs, self._weight, self.epsilon)
        unequal = (plain != found).float().mean() if plain.dtype == found.dtype else torch.ones(())
        if float(unequal) <= _UNEQUAL and torch.allclose(plain.float(), found.float(), rtol=2**-6):
            self._kernel = kernel


def norm_of(module: nn.Module) -> RowNorm | None:
    """A norm to be used in a module's place; None: it seems to be none, or not one in bfloat16 on a processor."""
    parameters = dict(module.named_parameters())
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = parameters.get("weight")
    if (
        "RMSNorm" not in type(module).__name__
        or list(parameters) != ["weight"]
        or list(module.children())
        or weight is None
        or type(weight) is not nn.Parameter
        or weight.requires_grad
        or (weight.dim(), weight.dtype, weight.device.type) != (1, torch.bfloat16, "cpu")
        or not isinstance(epsilon, float)
    ):
        return None
    norm_kernel()
    return RowNorm(module, epsilon)
