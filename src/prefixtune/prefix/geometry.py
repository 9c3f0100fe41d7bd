"""Where a prefix can be, and the shapes of its layers there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Site = Literal["encoder", "decoder", "cross"]
"""Where a prefix can be: encoder self-attention, decoder self-attention, decoder cross-attention."""

SITES: tuple[Site, ...] = get_args(Site)

BackboneKind = Literal["decoder", "encoder", "encoder-decoder"]
"""Decoder-only (GPT-2, LLaMA), encoder (BERT), encoder-decoder (BART, T5)."""


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


Geometry = Mapping[Site, tuple[LayerShape, ...]]
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


def spell_lengths(lengths: Mapping[Site, int] | Mapping[str, int]) -> str:
    """P of each site, as the option `sites` takes it.

    >>> spell_lengths({"encoder": 10, "cross": 5})
    'encoder=10,cross=5'
    """
    return ",".join(f"{site}={length}" for site, length in lengths.items())
