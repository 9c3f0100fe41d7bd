"""The cross-entropy of rows of logits by compiled code (`loss.cpp`), and its gradient, in one visit of each row."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import Future
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.backbone.native.compare import near
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["LossKernel", "loss_kernel"]

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}


class LossKernel(NativeLibrary):
    """The compiled loss."""

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._functions = {dtype: getattr(library, f"losses_{suffix}") for dtype, suffix in _NAMES.items()}
        for function in self._functions.values():
            function.argtypes, function.restype = [*[ctypes.c_void_p] * 4, *[ctypes.c_int64] * 3], None

    def computes(self) -> bool:
        """Whether a few rows have the losses and gradients of torch's functions."""
        labels = torch.tensor([0, 70, 99, 3])
        for dtype in _NAMES:
            logits = torch.linspace(-9, 20, 400, dtype=torch.float32).sin().mul(12).view(4, 100).to(dtype)
            slopes, losses = logits.clone(), torch.empty(4, dtype=torch.float32)
            self.replace(slopes, labels, losses)
            wide = logits.double()
            expected = (wide.softmax(-1) - F.one_hot(labels, 100)).to(dtype)
            if not (near(slopes, expected) and near(losses, F.cross_entropy(wide, labels, reduction="none").float())):
                return False
        return True

    @staticmethod
    def supports(hidden: Tensor, labels: Tensor, vocabulary: int) -> bool:
        """Whether it computes the loss of logits that are made of these hidden states."""
        tensors = hidden.is_cpu and labels.is_cpu and hidden.dtype in _NAMES and labels.dtype == torch.int64
        # It would read what is beside a row.
        return tensors and labels.is_contiguous() and bool(((labels >= 0) & (labels < vocabulary)).all())

    def replace(self, logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], losses: Float[Tensor, " N"]) -> None:
        """Fill in the labels' losses, in float32, and replace the logits by d loss / d logits = softmax - one-hot.

        Args:
            logits: Contiguous.
            labels: Each below V.
            losses: What is filled in.
        """
        threads = torch.get_num_threads()
        scratch = torch.empty(threads, logits.shape[1], dtype=torch.float32)
        pointers = logits.data_ptr(), labels.data_ptr(), losses.data_ptr(), scratch.data_ptr()
        self._functions[logits.dtype](*pointers, *logits.shape, threads)


@functools.cache
def loss_kernel() -> Future[LossKernel | None]:
    """The compiled loss, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("loss.cpp"), LossKernel, "losses are computed")
