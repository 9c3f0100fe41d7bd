"""Call the compiled attention over slots (`slot_attention.cpp`)."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from concurrent.futures import Future
from itertools import accumulate
from pathlib import Path
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.kernels import ScoreOptions, eager_attention
from prefixtune.attention.registry import ATTENTION
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.shared_prefix import SharedPrefix
from prefixtune.engine.span import QuerySpan
from prefixtune.utils.native.build import start
from prefixtune.utils.native.library import NativeLibrary

__all__ = ["SOURCE", "AttentionCall", "AttentionKernel", "Span", "load_kernel", "make_spans"]

SOURCE = Path(__file__).with_name("slot_attention.cpp")

_FUNCTIONS = {torch.float32: "slot_attention_float", torch.bfloat16: "slot_attention_bfloat16"}
_Strides = ctypes.c_int64 * 2


def load_kernel(wait: float = 0.0) -> AttentionKernel | None:
    """The compiled attention; None: it is not ready yet, or cannot be made here, which is logged once.

    The first call starts to make it, beside the caller.

    Args:
        wait: Most seconds to wait for it.
    """
    try:
        return _start().result(wait)
    except TimeoutError:
        return None


@functools.cache
def _start() -> Future[AttentionKernel | None]:
    return start(SOURCE, AttentionKernel, "attention to running texts is computed")


class Span(ctypes.Structure):
    """Tokens of one sequence in a step's row."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("slot", "start", "count", "prefix_length", "first_token")),
        ("prefix", ctypes.c_void_p),
    ]


class AttentionCall(ctypes.Structure):
    """Everything that a call of the compiled function takes; as in `slot_attention.cpp`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("keys", "values", "query", "key", "value", "out", "spans")),
        *((name, ctypes.c_void_p) for name in ("bias", "sinks")),
        *((f"{name}_strides", _Strides) for name in ("keys", "values", "query", "key", "value")),
        *((name, ctypes.c_int64) for name in ("num_spans", "layer", "heads", "kv_heads", "key_dim", "value_dim")),
        *((name, ctypes.c_int64) for name in ("bias_length", "window", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]


class AttentionKernel(NativeLibrary):
    """The compiled attention."""

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {"slot_attention_call_size": AttentionCall}

    def bind(self, library: ctypes.CDLL) -> None:
        """See `NativeLibrary`."""
        self._functions = {}
        for dtype, name in _FUNCTIONS.items():
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.POINTER(AttentionCall)], ctypes.c_int
            self._functions[dtype] = function

    def computes(self) -> bool:
        """Whether a small case has the result of matrix products."""
        draw = torch.Generator().manual_seed(0)
        keys, values, query, key, value = (
            torch.randn(1, heads, length, 24, generator=draw, dtype=torch.float32)
            for heads, length in ((2, 90), (2, 90), (4, 7), (2, 7), (2, 7))
        )
        scores, positions = ScoreOptions(0.5), torch.arange(80, 87)[:, None]
        spans = make_spans([QuerySpan(0, 80, 7, 3)])
        found = self.attend(keys, values, spans, query, (key, value), scores, 20, None)
        columns = torch.arange(87)
        visible = (columns <= positions) & ((positions - columns < 20) | (columns < 3))
        expected = eager_attention(query, keys[:, :, :87], values[:, :, :87], visible, scores).transpose(1, 2)
        written = torch.equal(keys[:, :, 80:87], key) and torch.equal(values[:, :, 80:87], value)
        # Two sequences that end there, whose prefix stands outside their slots.
        prefix = SharedPrefix([(keys[0, :, :3].contiguous(), values[0, :, :3].contiguous())])
        spans = make_spans([QuerySpan(slot, 80, 1, 3, prefix) for slot in (0, 1)])
        slot_keys, slot_values = (each[:, :, 3:].repeat(2, 1, 1, 1) for each in (keys, values))
        queries = query[:, :, [0, 0]]
        shared = self.attend(slot_keys, slot_values, spans, queries, None, scores, 20, None)
        pairs = ((found, expected), (shared, expected[:, [0, 0]]))
        return written and all(torch.allclose(one, other, atol=1e-4) for one, other in pairs)

    def computes_for(self, backbone: Backbone) -> bool:
        """Whether it can be expected to compute a backbone's attention; `supports` says so of each layer."""
        return (
            backbone.dtype in self._functions
            and backbone.device.type == "cpu"
            and backbone.compute_dtype is None
            and backbone.model.config._attn_implementation == ATTENTION
        )

    def supports(self, keys: Tensor, values: Tensor, query: Tensor, scores: ScoreOptions) -> bool:
        """Whether it computes this attention."""
        dtype = keys.dtype
        return (
            dtype in self._functions
            and query.dtype == dtype
            and values.dtype == dtype
            and keys.device.type == "cpu"
            and scores.kernel == "sdpa"
            and query.shape[1] % keys.shape[1] == 0
        )

    def attend(
        self,
        keys: Float[Tensor, "S H C Dk"],
        values: Float[Tensor, "S H _C Dv"],
        spans: ctypes.Array[Span],
        query: Float[Tensor, "1 Hq T Dk"],
        new: tuple[Float[Tensor, "1 H T Dk"], Float[Tensor, "1 H T Dv"]] | None,
        scores: ScoreOptions,
        window: int | None,
        bias: Float[Tensor, "Hq N"] | None,
        layer: int = 0,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Write a row's keys and values into the slots, and attend to the slots.

        Args:
            keys: Of all slots.
            values: Of all slots.
            spans: What the row is made of.
            query: Of the row.
            new: Keys and values of the row; None: the slots have them.
            scores: How scores are made; without a position bias.
            window: Of the text, how many positions each sees; None: all.
            bias: Added to scores by distance, except at the prefix; the last one holds for all larger distances.
            layer: Which of a shared prefix's keys and values are read.

        Raises:
            MemoryError: There is not enough.
        """
        call = AttentionCall()
        heads, tokens = query.shape[1], query.shape[2]
        call.heads, call.kv_heads, call.key_dim, call.value_dim = heads, keys.shape[1], keys.shape[3], values.shape[3]
        # Kept until the call has returned.
        kept = [keys, values]
        call.keys, call.keys_strides = keys.data_ptr(), _Strides(*keys.stride()[:2])
        call.values, call.values_strides = values.data_ptr(), _Strides(*values.stride()[:2])
        query = _rows(query, kept)
        call.query, call.query_strides = query.data_ptr(), _Strides(*query.stride()[1:3])
        if new is not None:
            key, value = _rows(new[0].to(keys.dtype), kept), _rows(new[1].to(values.dtype), kept)
            call.key, call.key_strides = key.data_ptr(), _Strides(*key.stride()[1:3])
            call.value, call.value_strides = value.data_ptr(), _Strides(*value.stride()[1:3])
        if bias is not None:
            bias = bias.to(torch.float32).contiguous()
            kept.append(bias)
            call.bias, call.bias_length = bias.data_ptr(), bias.shape[1]
        if scores.sinks is not None:
            sinks = scores.sinks.to(torch.float32).contiguous()
            kept.append(sinks)
            call.sinks = sinks.data_ptr()
        out = torch.empty(1, tokens, heads, values.shape[3], dtype=query.dtype)
        call.out = out.data_ptr()
        call.spans, call.num_spans = ctypes.addressof(spans), len(spans)
        call.layer, call.window, call.threads = layer, window or 0, torch.get_num_threads()
        call.scale, call.softcap = scores.scale, scores.softcap or 0.0
        if self._functions[keys.dtype](ctypes.byref(call)):
            raise MemoryError("attention had not enough memory.")
        return out


def _rows(tensor: Tensor, kept: list[Tensor]) -> Tensor:
    """The tensor, its last dimension contiguous."""
    if tensor.stride(-1) != 1:
        tensor = tensor.contiguous()
    kept.append(tensor)
    return tensor


def make_spans(spans: Sequence[QuerySpan]) -> ctypes.Array[Span]:
    """What the compiled code reads of spans that are one after the other in the row; they must be kept meanwhile.

    Decodes with one shared prefix are put together, so that it is read once for several of them.
    """
    firsts = accumulate((span.count for span in spans), initial=0)
    pairs = sorted(zip(spans, firsts, strict=False), key=lambda pair: (pair[0].count > 1, id(pair[0].shared)))
    made = (Span * len(spans))()
    for to, (span, first) in zip(made, pairs, strict=True):
        to.slot, to.start, to.count, to.prefix_length = span.slot, span.start, span.count, span.prefix_length
        to.first_token = first
        if span.shared is not None:
            to.prefix = ctypes.addressof(span.shared.pointers)
    return made
