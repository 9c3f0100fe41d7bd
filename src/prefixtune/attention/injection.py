"""What a call of the model carries down to its attention layers: the prefixes, and how a row is made up."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.disentangled import PrefixKV, disentangled_prefix, is_disentangled
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.attention.layout import Layout
from prefixtune.attention.masks import causal_mask, extend_mask
from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = [
    "AttentionBackend",
    "AttentionCall",
    "Injection",
    "batch_prefixes",
    "injecting",
    "observe_attention",
    "to_rows",
    "trace_calls",
    "using",
]


@runtime_checkable
class AttentionBackend(Protocol):
    """What keeps the keys and values of many texts; a row holds their next tokens (see `forward_with_backend`)."""

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Store keys and values (the tokens' own; at `cross` those of sources), and attend to all that is visible."""


@dataclass(frozen=True, eq=False)
class Injection:
    """What travels with one call down to every attention layer.

    Attributes:
        layer_of: Attention module -> its (site, index), as in the model's layout.
        layers: Site -> per layer, keys and values of shape (B or 1, H, P, D).
        prefix_mask: Site -> which prefix slots are real, (B, P); None: all are.
        packing: The structure of a packed row; None: an ordinary batch.
        layers_by_prefix: In a packed row, what `layers` is in a batch, for each prefix.
        backend: Keeps all keys and values itself, the prefixes' too, and computes the attention; None: nothing does.
    """

    layer_of: Mapping[nn.Module, tuple[Site, int]]
    layers: Mapping[Site, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    prefix_mask: Mapping[Site, Tensor | None] = field(default_factory=dict)
    packing: Packing | None = None
    layers_by_prefix: Sequence[Mapping[Site, Sequence[tuple[Tensor, Tensor]]]] = ()
    backend: AttentionBackend | None = None

    def prefix_kv(self, layer: tuple[Site, int]) -> tuple[Tensor, Tensor] | None:
        """The keys and values in front at an attention layer; None: no prefix."""
        site, index = layer
        return self.layers[site][index] if site in self.layers else None

    def packed_prefixes(self, layer: tuple[Site, int]) -> Sequence[tuple[Tensor, Tensor] | None]:
        """The prefixes that a packed row's groups count through, at an attention layer."""
        site, index = layer
        return [layers[site][index] if site in layers else None for layers in self.layers_by_prefix]

    def prepend(
        self,
        module: nn.Module,
        query: Float[Tensor, "B Hq T Dk"],
        key: Float[Tensor, "Bk H S Dk"],
        value: Float[Tensor, "Bk H S Dv"],
        mask: Tensor | None,
        scores: ScoreOptions,
    ) -> tuple[Tensor, Tensor, Tensor | None, ScoreOptions]:
        """Keys, values, mask and position bias with the prefix of the layer in front; as they were without one.

        On an accelerator, fused causal attention in which all rows see their whole prefix is left without a mask.
        """
        layer = self.layer_of.get(module)
        prefix_kv = None if layer is None else self.prefix_kv(layer)
        if layer is None or prefix_kv is None:
            return key, value, mask, scores
        queries, rows, length = query.shape[2], query.shape[0], prefix_kv[0].shape[2]
        prefix_mask = self.prefix_mask.get(layer[0])
        plain = prefix_mask is None and scores.fused and scores.position_bias is None
        unmasked = plain and query.device.type != "cpu" and attention_observer.get() is None
        if mask is None and scores.causal and queries > 1 and not unmasked:
            mask = causal_mask(query, key)
        key = torch.cat([to_rows(prefix_kv[0], rows).to(key), key], dim=2)
        value = torch.cat([to_rows(prefix_kv[1], rows).to(value), value], dim=2)
        if prefix_mask is not None:
            prefix_mask = to_rows(prefix_mask, rows).to(key.device)
        if scores.position_bias is not None:
            scores = replace(scores, position_bias=nn.functional.pad(scores.position_bias, (length, 0)))
        return key, value, extend_mask(mask, prefix_mask, length, key, queries), scores


class AttentionCall(NamedTuple):
    """One call of the attention function, as `trace_calls` sees it.

    Attributes:
        module: The attention layer.
        key: The keys that it attends to.
        value: The values that it gets.
        mask: What it was given to hide positions.
        arguments: The other arguments.
    """

    module: nn.Module
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    arguments: Mapping[str, Any] = MappingProxyType({})


traced_calls: contextvars.ContextVar[list[AttentionCall] | None] = contextvars.ContextVar("traced_calls", default=None)
AttentionObserver = Callable[[tuple[Site, int], int, Tensor, Tensor, Tensor, Tensor | None, ScoreOptions, int], None]
"""Gets a layer's (site, index), P, queries, keys and values with the prefix in front, mask, score options, and where in
the row the first query is."""

attention_observer: contextvars.ContextVar[AttentionObserver | None] = contextvars.ContextVar(
    "attention_observer", default=None
)
current_injection: contextvars.ContextVar[Injection | None] = contextvars.ContextVar("injection", default=None)


@contextlib.contextmanager
def using(variable: contextvars.ContextVar[Any], value: Any) -> Iterator[None]:
    """While the block runs, a variable has a value."""
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


@contextlib.contextmanager
def trace_calls(model: nn.Module) -> Iterator[list[AttentionCall]]:
    """While the block runs, every call of a model's attention is added to the list that it yields.

    The model need not have been probed; what is injected in the block is traced, too.
    """
    calls: list[AttentionCall] = []
    # Without prefixes, any number of a layer does.
    with using(traced_calls, calls), injecting(Injection(dict.fromkeys(model.modules(), ("encoder", 0)))):
        yield calls


def observe_attention(observer: AttentionObserver) -> contextlib.AbstractContextManager[None]:
    """While the block runs, `observer` is called before each layer attends; in a packed row, for each of its groups.

    The engine's rows, generation, whose cache holds the prefix, and disentangled attention are not observed.
    """
    return using(attention_observer, observer)


@contextlib.contextmanager
def injecting(injection: Injection) -> Iterator[None]:
    """While the block runs, every call of the model has these prefixes in front, and carries what else is given.

    Calls of other threads are not concerned.
    """
    with using(current_injection, injection), _inject_disentangled(injection):
        yield


@contextlib.contextmanager
def _inject_disentangled(injection: Injection) -> Iterator[None]:
    """While the block runs, layers of disentangled attention have the prefix in front too."""

    def prefix_kv(module: nn.Module, rows: int) -> PrefixKV | None:
        layer = injection.layer_of.get(module)
        kv = None if layer is None else injection.prefix_kv(layer)
        if layer is None or kv is None:
            return None
        mask = injection.prefix_mask.get(layer[0])
        return to_rows(kv[0], rows), to_rows(kv[1], rows), None if mask is None else to_rows(mask, rows)

    def on_kv(module: nn.Module, key: Tensor, value: Tensor) -> None:
        calls = traced_calls.get()
        if calls is not None:
            calls.append(AttentionCall(module, key, value))

    def is_active() -> bool:
        return current_injection.get() is injection

    with contextlib.ExitStack() as stack:
        for module in injection.layer_of:
            if is_disentangled(module):
                stack.enter_context(disentangled_prefix(module, prefix_kv, on_kv, is_active))
        yield


def to_rows(tensor: Tensor, rows: int) -> Tensor:
    """One entry for all rows, one per row, or one per text whose beams are neighbouring rows."""
    if tensor.shape[0] == 1:
        return tensor.expand(rows, *tensor.shape[1:])
    return tensor if tensor.shape[0] == rows else tensor.repeat_interleave(rows // tensor.shape[0], dim=0)


def batch_prefixes(prefixes: Sequence[Prefix | None], layout: Layout, dtype: torch.dtype, device: Any) -> Injection:
    """The rows' prefixes as one batch: shorter ones are padded in front, with hidden slots.

    Args:
        prefixes: One per row, or a single one for all rows; None: that row has no prefix.
        layout: The model's.
        dtype: Of the result.
        device: The model's.
    """
    layers: dict[Site, list[tuple[Tensor, Tensor]]] = {}
    prefix_mask: dict[Site, Tensor | None] = {}
    for site, shapes in layout.geometry.items():
        lengths = [0 if prefix is None else prefix.length(site) for prefix in prefixes]
        if not any(lengths):
            continue
        layers[site] = []
        for index, shape in enumerate(shapes):
            rows = [
                (torch.zeros(shape.num_kv_heads, 0, shape.key_dim), torch.zeros(shape.num_kv_heads, 0, shape.value_dim))
                if prefix is None or length == 0
                else prefix.layers[site][index]
                for prefix, length in zip(prefixes, lengths, strict=True)
            ]
            key, value = (_stack([tensor.to(device, dtype) for tensor in side]) for side in zip(*rows, strict=True))
            layers[site].append((key, value))
        ends, longest = torch.tensor(lengths, device=device)[:, None], max(lengths)
        every = min(lengths) == longest
        prefix_mask[site] = None if every else torch.arange(longest, device=device)[None] >= longest - ends
    return Injection(layout.layer_of, layers, prefix_mask)


def _stack(rows: Sequence[Float[Tensor, "H _P D"]]) -> Float[Tensor, "B H P D"]:
    """Rows of several lengths, padded in front."""
    if len(rows) == 1:
        return rows[0][None]
    longest = max(row.shape[1] for row in rows)
    return torch.stack([nn.functional.pad(row, (0, 0, longest - row.shape[1], 0)) for row in rows])
