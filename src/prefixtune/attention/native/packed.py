"""Attention of a packed row as one operation, forward and backward, by compiled code (`packed_attention.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from prefixtune.attention.native.plan import GroupEntry, Plan, SegmentEntry, make_plan
from prefixtune.attention.packing import Group, Packing
from prefixtune.prefix.geometry import Site
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["SMALLEST", "PackedKernel", "compiled_attention", "packed_kernel"]

SMALLEST = 256
"""Numbers of all heads of a position below which a model has no use for compiled attention."""
_SECONDS = 150.0
"""Longest wait for the compiler, which has a limit of its own."""
_FUNCTIONS = {torch.float32: "float", torch.bfloat16: "bfloat16"}
_Strides = ctypes.c_int64 * 2


class _Prefix(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("key", "value", "key_gradient", "value_gradient")]
    _fields_ += [("length", ctypes.c_int64), ("key_strides", _Strides), ("value_strides", _Strides)]


_POINTERS = ("query", "key", "value", "out_gradient", "out", "query_gradient", "key_gradient", "value_gradient")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in (*_POINTERS, "log_sums", "groups", "segments", "prefixes")),
        *((name, ctypes.c_void_p) for name in ("prefix_of_group", "hidden")),
        *((f"{name}_strides", _Strides) for name in ("query", "key", "value", "out_gradient")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_groups", "num_prefixes", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("key_dim", "value_dim", "window", "threads")),
        ("scale", ctypes.c_float),
    ]


class PackedKernel(NativeLibrary):
    """The compiled attention of a packed row."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {
        "packed_attention_call_size": _Call,
        "packed_attention_group_size": GroupEntry,
        "packed_attention_segment_size": SegmentEntry,
        "packed_attention_prefix_size": _Prefix,
    }

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self.functions = {}
        for dtype, name in _FUNCTIONS.items():
            both = [getattr(library, f"packed_attention_{kind}{name}") for kind in ("", "gradients_")]
            for function in both:
                function.argtypes, function.restype = [ctypes.POINTER(_Call)], ctypes.c_int
            self.functions[dtype] = both[0], both[1]

    def computes(self) -> bool:
        """Whether a source, a target and a prefix have the results and gradients of torch's attention."""
        draw = torch.Generator().manual_seed(0)
        plain: Any = {"dtype": torch.float32, "device": "cpu"}
        shapes = ((4, 20), (2, 20), (2, 20), (2, 5), (2, 5))
        for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.05)):
            query, key, value, *prefix = (
                torch.randn(1, heads, length, 24, generator=draw, **plain).to(dtype).float().requires_grad_()
                for heads, length in shapes
            )
            rows = query.to(dtype), key.to(dtype), value.to(dtype)
            plan = make_plan(Packing((Group(0, 12, (8,)),)), "decoder", False)
            found = _attend(_Row(self, plan, (0,), 0.5, None), *rows, *prefix)
            keys, values = torch.cat([prefix[0], key], 2), torch.cat([prefix[1], value], 2)
            mask = torch.ones(20, 25, dtype=torch.bool, device="cpu").tril(5)
            expected = F.scaled_dot_product_attention(query, keys, values, mask, scale=0.5, enable_gqa=True)
            gradient = torch.randn(1, 20, 4, 24, generator=draw, **plain)
            inputs = [query, key, value, *prefix]
            pairs = [
                (found.float(), expected.transpose(1, 2)),
                *zip(
                    torch.autograd.grad((found.float() * gradient).sum(), inputs),
                    torch.autograd.grad((expected.transpose(1, 2) * gradient).sum(), inputs),
                    strict=True,
                ),
            ]
            if not all(torch.allclose(*pair, rtol=tolerance, atol=4 * tolerance) for pair in pairs):
                return False
        return True


@functools.cache
def packed_kernel() -> Future[PackedKernel | None]:
    """The compiled attention, as soon as it is made; None: it cannot be made here, which is logged once."""
    return start(Path(__file__).with_name("packed_attention.cpp"), PackedKernel, "attention of training is computed")


@functools.cache
def _kernel() -> PackedKernel | None:
    """What all of this process's rows are computed by."""
    try:
        return packed_kernel().result(_SECONDS)
    except TimeoutError:
        return None


def compiled_attention(
    packing: Packing,
    site: Site,
    prefix_kv_by_group: Sequence[tuple[Tensor, Tensor] | None],
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    scale: float,
    window: int | None,
    infix: bool,
) -> Float[Tensor, "1 T Hq Dv"] | None:
    """Attention of a packed row; None: it is not for compiled code, or there is none.

    It waits for the compiler, so that a run has the same numbers whenever that is done.

    Args:
        packing: The row's groups.
        site: Where.
        prefix_kv_by_group: The prefix in front of each group, (1, H, P, D) keys and values; None: no prefix.
        query: Of the whole row, as are keys and values.
        key: See there.
        value: See there.
        scale: Multiplies the scores.
        window: Only the nearest `window` text positions are visible; None: all.
        infix: The prefix is hidden from the sources.

    Raises:
        MemoryError: There is not enough.
    """
    prefixes: dict[int, tuple[Tensor, Tensor]] = {id(pair): pair for pair in prefix_kv_by_group if pair is not None}
    if not _fits(query, key, value, *(tensor for pair in prefixes.values() for tensor in pair)) or scale <= 0:
        return None
    plan = make_plan(packing, site, infix)
    lengths = [0 if pair is None else pair[0].shape[2] for pair in prefix_kv_by_group]
    counts = (plan.num_queries, plan.num_keys) == (query.shape[2], key.shape[2])
    if not counts or (site != "decoder" and 0 in map(sum, zip(lengths, plan.num_shared, strict=True))):
        return None
    kernel = _kernel()
    if kernel is None:
        return None
    places = {pair: index for index, pair in enumerate(prefixes)}
    owners = tuple(-1 if pair is None else places[id(pair)] for pair in prefix_kv_by_group)
    tensors = [tensor for pair in prefixes.values() for tensor in pair]
    return _attend(_Row(kernel, plan, owners, scale, window), query, key, value, *tensors)


def _fits(query: Tensor, key: Tensor, value: Tensor, *prefixes: Tensor) -> bool:
    """Whether compiled code takes such tensors."""
    return (
        query.dtype in _FUNCTIONS
        and query.shape[1] * query.shape[3] >= SMALLEST
        and query.shape[2] > 0
        and query.shape[1] % key.shape[1] == 0
        and query.dtype == key.dtype == value.dtype
        and all(tensor.dtype == torch.float32 and tensor.shape[0] == 1 for tensor in prefixes)
        # Not a subclass, which may have no data.
        and all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (query, key, value, *prefixes))
        and all(tensor.device.type == "cpu" and tensor.shape[0] == 1 for tensor in (query, key, value, *prefixes))
        # Those of inference mode cannot be kept for gradients.
        and not (torch.is_grad_enabled() and any(tensor.is_inference() for tensor in (query, key, value, *prefixes)))
        and not torch.compiler.is_compiling()
    )


@dataclass(eq=False)
class _Row:
    """What a call takes beside tensors; `owners`: which prefix is in front of each group, -1 that there is none."""

    kernel: PackedKernel
    plan: Plan
    owners: tuple[int, ...]
    scale: float
    window: int | None


class _Attention(torch.autograd.Function):
    """Gradients are computed from queries, keys, values and the logarithms of the softmax's sums alone."""

    @staticmethod
    def forward(ctx: Any, row: _Row, query: Tensor, key: Tensor, value: Tensor, *prefixes: Tensor) -> Tensor:
        heads, tokens = query.shape[1], query.shape[2]
        out = query.new_empty(1, tokens, heads, value.shape[3])
        log_sums = query.new_empty(heads, tokens, dtype=torch.float32)
        call = _BoundCall(row, query, key, value, prefixes)
        call.point(out=out, log_sums=log_sums)
        call.run(row.kernel.functions[query.dtype][0])
        ctx.row = row
        ctx.save_for_backward(query, key, value, log_sums, *prefixes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, out_gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, log_sums, *prefixes = ctx.saved_tensors
        row = ctx.row
        call = _BoundCall(row, query, key, value, prefixes, out_gradient.transpose(1, 2))
        # Each position's heads side by side, as the model's own products have them.
        query_gradient, key_gradient, value_gradient = (
            tensor.new_empty(1, tensor.shape[2], tensor.shape[1], tensor.shape[3]) for tensor in (query, key, value)
        )
        call.point(query_gradient=query_gradient, key_gradient=key_gradient, value_gradient=value_gradient)
        call.point(log_sums=log_sums)
        call.run(row.kernel.functions[query.dtype][1])
        rows = [gradient.transpose(1, 2) for gradient in (query_gradient, key_gradient, value_gradient)]
        return None, *rows, *call.prefix_gradients


def _attend(row: _Row, *tensors: Tensor) -> Tensor:
    out: Tensor = _Attention.apply(row, *tensors)  # type: ignore[no-untyped-call]
    return out


class _BoundCall:
    """A call of the compiled function, with the tensors that it points to."""

    def __init__(
        self,
        row: _Row,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        prefixes: Sequence[Tensor],
        out_gradient: Tensor | None = None,
    ) -> None:
        self.call = call = _Call()
        self._kept: list[Any] = []
        self.prefix_gradients: list[Tensor] = []
        for name, tensor in (("query", query), ("key", key), ("value", value), ("out_gradient", out_gradient)):
            if tensor is not None:
                tensor = self._rows(tensor)
                setattr(call, name, tensor.data_ptr())
                setattr(call, f"{name}_strides", _Strides(*tensor.stride()[1:3]))
        call.heads, call.tokens, call.key_dim = query.shape[1:]
        call.kv_heads, call.value_dim = key.shape[1], value.shape[3]
        plan, owners = row.plan, (ctypes.c_int64 * len(row.owners))(*row.owners)
        call.groups, call.num_groups = ctypes.addressof(plan.groups), len(plan.groups)
        call.segments, call.hidden = ctypes.addressof(plan.segments), ctypes.addressof(plan.hidden)
        entries = (_Prefix * (len(prefixes) // 2))()
        for entry, pair in zip(entries, zip(prefixes[::2], prefixes[1::2], strict=True), strict=True):
            self._add_prefix(entry, *pair, gradients=out_gradient is not None)
        call.prefixes, call.num_prefixes = ctypes.addressof(entries), len(entries)
        call.prefix_of_group = ctypes.addressof(owners)
        call.scale, call.window, call.threads = row.scale, row.window or 0, torch.get_num_threads()
        self._kept += [owners, entries]

    def _add_prefix(self, entry: _Prefix, key: Tensor, value: Tensor, gradients: bool) -> None:
        key, value = self._rows(key), self._rows(value)
        entry.length = key.shape[2]
        entry.key, entry.key_strides = key.data_ptr(), _Strides(*key.stride()[1:3])
        entry.value, entry.value_strides = value.data_ptr(), _Strides(*value.stride()[1:3])
        if gradients:
            own = [tensor.new_zeros(tensor.shape) for tensor in (key, value)]
            entry.key_gradient, entry.value_gradient = own[0].data_ptr(), own[1].data_ptr()
            self.prefix_gradients += own

    def _rows(self, tensor: Tensor) -> Tensor:
        """The tensor, its last dimension contiguous."""
        tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
        self._kept.append(tensor)
        return tensor

    def point(self, **tensors: Tensor) -> None:
        """Say where contiguous tensors are."""
        for name, tensor in tensors.items():
            setattr(self.call, name, tensor.data_ptr())

    def run(self, function: Any) -> None:
        """Make the call."""
        if function(ctypes.byref(self.call)):
            raise MemoryError("attention had not enough memory.")
