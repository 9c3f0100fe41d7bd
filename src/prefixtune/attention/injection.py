"""Injection."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.disentangled import Front, hooked, is_disentangled
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Geometry, Site
from prefixtune.prefix.prefix import KeyValue, Prefix

__all__ = ["AttentionBackend", "AttentionCall", "Injection", "batch_prefixes", "injecting", "to_rows", "trace_calls"]


@runtime_checkable
class AttentionBackend(Protocol):
    """What keeps the keys and values of many texts; a row holds their next tokens (see `forward_with_backend`)."""

    def attend(
        self,
        place: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        special: ScoreOptions,
        window: int | None,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Note keys and values (the tokens' own, at `cross` those of sources), and attend to all that is seen."""


@dataclass(frozen=True, eq=False)
class Injection:
    """What travels with one call down to every attention layer.

    Attributes:
        layer_of: The model's layout.
        layers: Site -> per layer, keys and values of shape (B or 1, H, P, D).
        visible: Site -> which prefix slots are real, (B, P); None: all are.
        packing: The structure of a packed row; None: an ordinary batch.
        several: In a packed row whose groups have prefixes of their own: for each prefix what `layers` is for one.
        infix: In a packed row, the sources do not see the prefix, only the targets do.
        recorded: When set, every layer's own keys and values are noted here.
        serving: When set, it keeps all keys and values itself, the prefixes' too, and computes the attention.
    """

    layer_of: Mapping[nn.Module, tuple[Site, int]]
    layers: Mapping[Site, Sequence[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    visible: Mapping[Site, Tensor | None] = field(default_factory=dict)
    packing: Packing | None = None
    several: Sequence[Mapping[Site, Sequence[tuple[Tensor, Tensor]]]] = ()
    infix: bool = False
    recorded: list[tuple[nn.Module, Tensor, Tensor]] | None = None
    serving: AttentionBackend | None = None

    def prefix_kv(self, module: nn.Module) -> tuple[Tensor, Tensor] | None:
        """The keys and values that stand in front at an attention layer."""
        layer = self.layer_of.get(module)
        if layer is None or layer[0] not in self.layers:
            return None
        site, index = layer
        return self.layers[site][index]

    def prefix_kv_by_group(self, module: nn.Module, packing: Packing) -> list[tuple[Tensor, Tensor] | None]:
        """The keys and values that stand in front of each group of a packed row at an attention layer."""
        if packing.prefix_index is None:
            return [self.prefix_kv(module)] * len(packing.groups)
        site, index = self.layer_of[module]
        each = [layers[site][index] if site in layers else None for layers in self.several]
        return [each[owner] for owner in packing.prefix_index]


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of the attention function, as `trace_calls` sees it.

    Attributes:
        module: The attention layer.
        carried: Whether the argument that holds the prefix came along.
        queries: How many positions look.
        key: What they look at.
        value: What they get.
        extras: Names of the other arguments that held a number, a tensor or the like.
        weighs: Whether the mask adds to scores, beyond hiding what may not be seen.
    """

    module: nn.Module
    carried: bool
    queries: int
    key: Tensor
    value: Tensor
    extras: frozenset[str]
    weighs: bool = False


recorded_calls: contextvars.ContextVar[list[AttentionCall] | None] = contextvars.ContextVar("watched", default=None)
current_injection: contextvars.ContextVar[Injection | None] = contextvars.ContextVar("current", default=None)


@contextlib.contextmanager
def trace_calls(model: nn.Module | None = None) -> Iterator[list[AttentionCall]]:
    """While the block runs, every call of the attention function is noted in the list that it yields.

    Args:
        model: Note the calls of its disentangled attention too, which has no place in a layout yet.
    """
    calls: list[AttentionCall] = []
    token = recorded_calls.set(calls)
    none = Injection({})
    inside = current_injection.set(none) if model is not None else None
    try:
        with _disentangled([] if model is None else model.modules(), none):
            yield calls
    finally:
        recorded_calls.reset(token)
        if inside is not None:
            current_injection.reset(inside)


@contextlib.contextmanager
def injecting(injection: Injection) -> Iterator[None]:
    """While the block runs, every call of the model has these prefixes in front.

    For generation, whose loop hands no argument of ours on. An argument of a call wins over it.
    """
    token = current_injection.set(injection)
    try:
        with _disentangled(injection.layer_of, injection):
            yield
    finally:
        current_injection.reset(token)


@contextlib.contextmanager
def _disentangled(modules: Iterable[nn.Module], injection: Injection) -> Iterator[None]:
    """While the block runs, layers of disentangled attention have the prefix in front too."""

    def front(module: nn.Module, rows: int) -> Front | None:
        pair = injection.prefix_kv(module)
        if pair is None:
            return None
        visible = injection.visible.get(injection.layer_of[module][0])
        return to_rows(pair[0], rows), to_rows(pair[1], rows), None if visible is None else to_rows(visible, rows)

    def seen(module: nn.Module, key: Tensor, value: Tensor) -> None:
        watched = recorded_calls.get()
        if watched is not None:
            watched.append(AttentionCall(module, False, key.shape[2], key, value, frozenset()))
        if injection.recorded is not None:
            injection.recorded.append((module, key, value))

    with contextlib.ExitStack() as stack:
        for module in modules:
            if is_disentangled(module):
                stack.enter_context(hooked(module, front, seen, lambda: current_injection.get() is injection))
        yield


def to_rows(given: Tensor, rows: int) -> Tensor:
    """One entry for all rows, one per row, or one per text whose beams are rows side by side."""
    if given.shape[0] == 1:
        return given.expand(rows, *given.shape[1:])
    return given if given.shape[0] == rows else given.repeat_interleave(rows // given.shape[0], dim=0)


# --- the injected route ----------------------------------------------------------------------------------------------


def batch_prefixes(prefixes: Sequence[Prefix | None], geometry: Geometry, dtype: torch.dtype, device: Any) -> Injection:
    """Bring the rows' prefixes to one length per site, shorter ones padded in front with hidden slots.

    Args:
        prefixes: One per row, or a single one for all rows; None: that row has no prefix.
        geometry: The backbone's.
        dtype: Of the result.
        device: The backbone's.
    """
    layers: dict[Site, list[tuple[Tensor, Tensor]]] = {}
    visible: dict[Site, Tensor | None] = {}
    for site, shapes in geometry.items():
        lengths = [0 if prefix is None else prefix.length(site) for prefix in prefixes]
        longest = max(lengths)
        if longest == 0:
            continue
        rows: list[list[KeyValue]] = []
        for prefix, length in zip(prefixes, lengths, strict=True):
            if prefix is None or length == 0:
                rows.append(
                    [
                        (
                            torch.zeros(s.num_kv_heads, longest, s.key_dim, dtype=dtype, device=device),
                            torch.zeros(s.num_kv_heads, longest, s.value_dim, dtype=dtype, device=device),
                        )
                        for s in shapes
                    ]
                )
                continue
            front = (0, 0, longest - length, 0)
            rows.append(
                [
                    (
                        nn.functional.pad(k.to(device, dtype), front) if length < longest else k.to(device, dtype),
                        nn.functional.pad(v.to(device, dtype), front) if length < longest else v.to(device, dtype),
                    )
                    for k, v in prefix.layers[site]
                ]
            )
        layers[site] = [
            (torch.stack([row[n][0] for row in rows]), torch.stack([row[n][1] for row in rows]))
            for n in range(len(shapes))
        ]
        all_real = all(length == longest for length in lengths)
        slots = torch.arange(longest, device=device)
        visible[site] = None if all_real else slots[None, :] >= longest - torch.tensor(lengths, device=device)[:, None]
    return Injection({}, layers, visible)
