"""Rotary position embeddings by compiled code (`rotation.cpp`), where a model's own take eight operations.

A model's attention layer finds the function that turns its queries and keys among its module's names. So a layer of a
copy of a model gets a `forward` that is the same code with another function under that name.
"""

from __future__ import annotations

import ctypes
import functools
import inspect
import types
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from prefixtune.backbone.native.compare import computes_same
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["RotationKernel", "rotation_kernel", "use_rotation"]

_NAMES = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_FUNCTION = "apply_rotary_pos_emb"
"""What transformers calls it in all of its models."""
_Four = ctypes.c_int64 * 4


class RotationKernel(NativeLibrary):
    """The compiled rotation."""

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._functions = {dtype: getattr(library, f"rotate_{suffix}") for dtype, suffix in _NAMES.items()}
        for function in self._functions.values():
            function.argtypes, function.restype = [*[ctypes.c_void_p] * 6, *[ctypes.c_int64] * 3], None

    def computes(self) -> bool:
        """Whether a few heads are turned as by torch's operations, and gradients back."""
        return all(self.computes_as(_plain_rotation, dtype) for dtype in _NAMES)

    def computes_as(self, function: Callable[..., Any], dtype: torch.dtype) -> bool:
        """Whether a model's function computes the same."""
        draw = torch.Generator().manual_seed(0)
        query, key = (
            torch.randn(2, 5, heads, 24, generator=draw, dtype=torch.float32).to(dtype).transpose(1, 2)
            for heads in (3, 1)
        )
        angles = 9 * torch.rand(2, 5, 24, generator=draw, dtype=torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        return computes_same(
            lambda query, key: self.apply(query, key, cos, sin),
            lambda query, key: function(query, key, cos, sin),
            [query, key],
        )

    def supports(self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> bool:
        """Whether it computes these."""
        shape = (query.shape[2], query.shape[3])
        return (
            query.dtype in _NAMES
            and all(tensor.dtype == query.dtype and tensor.is_cpu for tensor in (query, key, cos, sin))
            and query.dim() == key.dim() == 4
            and cos.shape == sin.shape
            and cos.dim() == 3
            and cos.shape[1:] == shape == key.shape[2:]
            and cos.shape[0] in (1, query.shape[0])
            and shape[1] % 2 == 0
        )

    def apply(
        self,
        query: Float[Tensor, "B Hq T D"],
        key: Float[Tensor, "B H T D"],
        cos: Float[Tensor, "Bc T D"],
        sin: Float[Tensor, "Bc T D"],
    ) -> tuple[Float[Tensor, "B Hq T D"], Float[Tensor, "B H T D"]]:
        """Queries and keys, turned; gradients flow through it to both."""
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad):
            both: tuple[Tensor, Tensor] = _Rotation.apply(query, key, cos, sin, self)  # type: ignore[no-untyped-call]
            return both
        return self.turn(query, cos, sin), self.turn(key, cos, sin)

    def turn(
        self,
        heads: Float[Tensor, "B H T D"],
        cos: Float[Tensor, "Bc T D"],
        sin: Float[Tensor, "Bc T D"],
        back: bool = False,
    ) -> Float[Tensor, "B H T D"]:
        """Heads, turned; `back`: the gradient in the heads, by that in the result."""
        if heads.stride(3) != 1:
            heads = heads.contiguous()
        cos, sin = cos.contiguous(), sin.contiguous()
        batch, num_heads, text, dim = heads.shape
        # As a model's own result: the heads of a position beside each other.
        out = torch.empty(batch, text, num_heads, dim, dtype=heads.dtype)
        cos_stride = 0 if len(cos) == 1 else text * dim
        pointers = heads.data_ptr(), cos.data_ptr(), sin.data_ptr(), out.data_ptr()
        shape, strides = _Four(*heads.shape), _Four(*heads.stride())
        self._functions[heads.dtype](*pointers, shape, strides, cos_stride, back, torch.get_num_threads())
        return out.transpose(1, 2)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(
        context: Any, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, kernel: RotationKernel
    ) -> tuple[Tensor, Tensor]:
        context.save_for_backward(cos, sin)
        context.kernel = kernel
        return kernel.turn(query, cos, sin), kernel.turn(key, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(context: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        kernel, (cos, sin) = context.kernel, context.saved_tensors
        return kernel.turn(query, cos, sin, back=True), kernel.turn(key, cos, sin, back=True), None, None, None


def _plain_rotation(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> list[Tensor]:
    turned = []
    for heads in (query.float(), key.float()):
        a, b = heads.chunk(2, dim=-1)
        turned.append((heads * cos[:, None].float() + torch.cat((-b, a), -1) * sin[:, None].float()).to(query.dtype))
    return turned


@functools.cache
def rotation_kernel() -> Future[RotationKernel | None]:
    """The compiled rotation, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("rotation.cpp"), RotationKernel, "rotations run")


def use_rotation(module: nn.Module, kernel: RotationKernel, dtype: torch.dtype) -> bool:
    """Let a model's attention layer turn queries and keys by compiled code; returns whether it does.

    Args:
        module: An attention layer of a copy of a model; it stays as it is if it turns them otherwise.
        kernel: The compiled rotation.
        dtype: Of queries and keys.
    """
    plain = inspect.unwrap(type(module).forward)
    if not isinstance(plain, types.FunctionType) or "forward" in vars(module):
        return False
    rotate = plain.__globals__.get(_FUNCTION)
    if rotate is None or _FUNCTION not in plain.__code__.co_names or not kernel.computes_as(rotate, dtype):
        return False

    def rotate_quickly(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs or not kernel.supports(query, key, cos, sin):
            return rotate(query, key, cos, sin, *args, **kwargs)
        return kernel.apply(query, key, cos, sin)

    names = {**plain.__globals__, _FUNCTION: rotate_quickly}
    forward = types.FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    module.forward = types.MethodType(forward, module)
    return True
