"""Where running texts keep their keys and values: one buffer per layer, a slot per text, written in place.

A prefix is copied into a slot's first positions; the text follows. A step's tokens stand in one row, whatever texts
they belong to; their attention is computed for all texts that add one token together, and one by one for texts that
add several, or that are far longer than the others. A slot that is given back is wiped: what stood there can reach no
other text, not even as NaN behind a mask. Knows nothing of requests and of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import RequestError
from prefixtune.prefix.geometry import LayerShape, Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["KVCache", "Span"]


_FIRST_CAPACITY = 256
"""Positions of a slot at first; doubled when a text needs more."""


@dataclass(frozen=True)
class Span:
    """Tokens of one text that are computed in a step.

    Attributes:
        slot: The text's.
        start: Position of the first of them, counted from the prefix's start.
        count: How many.
        prefix_length: Of the text's prefix.
    """

    slot: int
    start: int
    count: int
    prefix_length: int

    @property
    def stop(self) -> int:
        """The position behind the last."""
        return self.start + self.count


class KVCache:
    """Keys and values of all slots.

    Args:
        shapes: The layers of a site.
        num_slots: Texts at once.
        max_length: Most positions of one.
        dtype: Of keys and values.
        device: Where they are.
        site: Which.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_slots: int,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
        site: Site = "decoder",
    ) -> None:
        self.shapes, self.num_slots, self.max_length, self.site = tuple(shapes), num_slots, max_length, site
        self.dtype, self.device = dtype, device
        self.capacity = 0
        self.keys: list[Float[Tensor, "S H C Dk"]] = []
        self.values: list[Float[Tensor, "S H C Dv"]] = []
        self.reserve(1)

    def reserve(self, length: int) -> None:
        """Make room for texts of so many positions; what is there stays.

        Raises:
            RequestError: It is more than `max_length`.
        """
        if length > self.max_length:
            raise RequestError(
                f"{length} positions are needed, but a slot has at most {self.max_length}.",
                hint="shorten the text, or lower max_new_tokens.",
            )
        if length <= self.capacity:
            return
        before, capacity = self.capacity, min(self.max_length, max(_FIRST_CAPACITY, 2 * self.capacity, length))
        # Should memory not suffice, some buffers are longer than others: all hold `before` at least.
        for kind, buffers in (("key_dim", self.keys), ("value_dim", self.values)):
            for number, shape in enumerate(self.shapes):
                size = (self.num_slots, shape.num_kv_heads, capacity, getattr(shape, kind))
                # Zeros, not anything: what is masked must be finite all the same.
                made = torch.zeros(size, dtype=self.dtype, device=self.device)
                if before:
                    made[:, :, :before] = buffers[number][:, :, :before]
                    buffers[number] = made
                else:
                    buffers.append(made)
        self.capacity = capacity

    def put(self, slot: int, prefix: Prefix) -> None:
        """Copy a prefix into a slot's first positions."""
        length = prefix.length(self.site)
        self.reserve(length)
        for number, (key, value) in enumerate(prefix.layers.get(self.site, ())):
            self.keys[number][slot, :, :length] = key.to(self.device)
            self.values[number][slot, :, :length] = value.to(self.device)

    def copy(self, slot: int, other: int, length: int) -> None:
        """Copy a slot's first positions into another."""
        for buffer in (*self.keys, *self.values):
            buffer[other, :, :length] = buffer[slot, :, :length]

    def wipe(self, slot: int, length: int) -> None:
        """Leave nothing in a slot's first positions."""
        for buffer in (*self.keys, *self.values):
            buffer[slot, :, :length] = 0

    @property
    def num_bytes(self) -> int:
        """What the buffers take."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self.keys, *self.values))
