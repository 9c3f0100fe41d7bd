"""Geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["SITES", "Geometry", "LayerShape", "describe"]


SITES = ("encoder", "decoder", "cross")
"""Where a prefix can stand: encoder self-attention, decoder self-attention, decoder cross-attention."""


@dataclass(frozen=True)
class LayerShape:
    """What one attention layer keeps per position.

    Attributes:
        num_kv_heads: Key-value heads (fewer than query heads under grouped-query attention).
        key_dim: Size of one head's key.
        value_dim: Size of one head's value; nearly always equal to `key_dim`.
    """

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        """Numbers per position: all heads' keys and values."""
        return self.num_kv_heads * (self.key_dim + self.value_dim)


Geometry = Mapping[str, tuple[LayerShape, ...]]
"""Per site, the shape of every layer."""


def describe(geometry: Geometry) -> str:
    """A geometry in words, for messages.

    >>> describe({"decoder": (LayerShape(12, 64, 64),) * 12})
    'decoder: 12 layers x 12 KV heads x 64'
    """

    def one(layers: Sequence[LayerShape]) -> str:
        shapes = sorted({(s.num_kv_heads, s.key_dim) for s in layers})
        return f"{len(layers)} layers x " + " or ".join(f"{h} KV heads x {d}" for h, d in shapes)

    return "; ".join(f"{site}: {one(layers)}" for site, layers in geometry.items())
