"""Keys and values of running sequences: one buffer per layer, one slot per sequence, written in place.

A prefix is copied into a slot's first positions, and the sequence's tokens follow. A freed slot is wiped: its old
content must not reach another sequence, not even as NaN behind a mask.

All slots are as long as the longest text needed so far. On a CPU that costs little: positions that were never written
take no memory.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import ConfigError, RequestError
from prefixtune.prefix.geometry import LayerShape, Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["UNBOUNDED", "KVCache", "lazy_zeros"]


UNBOUNDED = 2**31
"""Positions of a slot whose content is limited elsewhere."""
INITIAL_CAPACITY = 256
"""Positions of a slot at first; doubled when a sequence needs more."""


class KVCache:
    """Keys and values of all slots.

    Args:
        shapes: The layers of a site.
        num_slots: Sequences at once.
        max_length: Most positions of a slot.
        dtype: Of keys and values.
        device: Of keys and values.
        site: The attention whose keys and values these are.

    Attributes:
        capacity: Positions that each slot has now.
        keys: Per layer, (slots, H, capacity, Dk).
        values: Per layer, (slots, H, capacity, Dv).

    Raises:
        ConfigError: Memory has no room for so many slots.
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
        try:
            self.reserve(1)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            size = min(max_length, INITIAL_CAPACITY) * self.bytes_per_position
            raise ConfigError(
                f"there is no room for the {size / 2**30:,.1f} GiB of {num_slots:,} slots.", hint="lower num_slots."
            ) from error

    def reserve(self, length: int) -> None:
        """Let every slot have at least `length` positions; their content stays.

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
        old, new = self.capacity, min(self.max_length, max(INITIAL_CAPACITY, 2 * self.capacity, length))
        # If memory does not suffice, some buffers are longer than others: all hold `old` positions at least.
        for dim, buffers in (("key_dim", self.keys), ("value_dim", self.values)):
            for layer, shape in enumerate(self.shapes):
                size = (self.num_slots, shape.num_kv_heads, new, getattr(shape, dim))
                buffer = lazy_zeros(size, self.dtype, self.device)
                if old:
                    self._copy_used(buffers[layer], buffer, old)
                    buffers[layer] = buffer
                else:
                    buffers.append(buffer)
        self.capacity = new

    def _copy_used(self, source: Float[Tensor, "S H C D"], target: Float[Tensor, "S H C2 D"], length: int) -> None:
        """Copy the first positions of all slots; on a CPU without the zeros of free ones, which take no memory."""
        if self.device.type != "cpu":
            target[:, :, :length] = source[:, :, :length]
            return
        for slot in range(self.num_slots):
            if source[slot].any():
                target[slot, :, :length] = source[slot, :, :length]

    def put(self, slot: int, prefix: Prefix) -> None:
        """Copy a prefix into a slot's first positions."""
        length = prefix.length(self.site)
        self.reserve(length)
        for layer, (key, value) in enumerate(prefix.layers.get(self.site, ())):
            self.keys[layer][slot, :, :length] = key.to(self.device)
            self.values[layer][slot, :, :length] = value.to(self.device)

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy a slot's first positions into another slot."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, :length] = buffer[source, :, :length]

    def wipe(self, slot: int, length: int) -> None:
        """Set a slot's first positions to zero."""
        for buffer in (*self.keys, *self.values):
            buffer[slot, :, :length] = 0

    @property
    def num_bytes(self) -> int:
        """Size of the buffers, in bytes; on a CPU, they take memory only where they were written."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (*self.keys, *self.values))

    @property
    def bytes_per_position(self) -> int:
        """What one more position of every slot takes, in bytes."""
        return self.num_slots * sum(shape.size for shape in self.shapes) * self.dtype.itemsize


def lazy_zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, not `empty`, as masked values must be finite; on a CPU, they take memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    num_bytes = math.prod(size) * dtype.itemsize
    if sys.platform == "win32":
        memory = mmap.mmap(-1, num_bytes)
    else:
        # A shared one would take memory where it is read, too.
        memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(*size)
