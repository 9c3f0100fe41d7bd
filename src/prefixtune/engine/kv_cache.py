"""Keys and values of running texts: one pool per layer, whose size is fixed at the start.

A text has a run of neighbouring positions, as many as it may ever need: its prefix, its prompt and its new tokens. So
its keys are a view of the pool, nothing grows or moves while it runs, and what it may take is known before it starts.
On a CPU the pool takes memory only where it was written. What a text leaves is wiped: it must not reach another one,
not even as NaN behind a mask.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import LayerShape, Site
from prefixtune.prefix.prefix import Prefix

PAGE = 256
"""Runs begin at multiples of it: FlashAttention's tables of pages want that, and on a CPU, texts whose runs are alike
are attended to together."""


class KVCache:
    """Keys and values of all running texts at one site.

    Args:
        shapes: The layers of the site.
        num_positions: Of all texts together.
        dtype: Of keys and values.
        device: Of keys and values.
        num_texts: Of them; on a CPU, each takes no memory behind its run's end, up to the next page.
        site: The attention whose keys and values these are.
        page: Runs begin at multiples of so many positions.

    Attributes:
        num_positions: Of all texts together; on a GPU, in whole pages.
        keys: Per layer, (N, H, Dk).
        values: Per layer, (N, H, Dv).
        taken: The runs that texts have, by their start.

    Raises:
        ConfigError: Memory has no room for it, or it has no position.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        num_texts: int,
        site: Site = "decoder",
        page: int = PAGE,
    ) -> None:
        on_cpu = device.type == "cpu"
        self.site, self.page = site, page
        self.num_positions = num_positions if on_cpu else num_positions // page * page
        length = (num_positions // page + num_texts) * page if on_cpu else self.num_positions
        size = self.num_positions * bytes_per_position(shapes, dtype) / 2**30
        hint = "set another kv_cache_mib."
        if not self.num_positions:
            raise ConfigError("memory has no room for keys and values.", hint=hint)
        try:
            self.keys = [_zeros((length, one.num_kv_heads, one.key_dim), dtype, device) for one in shapes]
            self.values = [_zeros((length, one.num_kv_heads, one.value_dim), dtype, device) for one in shapes]
        except (OSError, MemoryError, OverflowError, torch.OutOfMemoryError) as error:
            raise ConfigError(f"there is no room for {size:,.1f} GiB of keys and values.", hint=hint) from error
        self.taken, self._end = list[range](), length

    def take(self, length: int) -> range | None:
        """A run of so many positions that nobody has; None: there is no room now."""
        start = 0
        if sum(map(len, self.taken)) + length > self.num_positions:
            return None
        for index, taken in enumerate([*self.taken, range(self._end, self._end)]):
            if taken.start - start >= -(-length // self.page) * self.page:
                run = range(start, start + length)
                self.taken.insert(index, run)
                return run
            start = -(-taken.stop // self.page) * self.page
        return None

    def give_back(self, run: range, written: int) -> None:
        """Let others have a run, of which so many positions were written."""
        for buffer in (*self.keys, *self.values):
            buffer[run.start : run.start + written] = 0
        self.taken.remove(run)

    def put(self, run: range, prefix: Prefix) -> None:
        """Copy a prefix to the first positions of a run."""
        place = slice(run.start, run.start + prefix.length(self.site))
        for layer, (key, value) in enumerate(prefix.layers.get(self.site, ())):
            self.keys[layer][place] = key.to(self.keys[layer].device).transpose(0, 1)
            self.values[layer][place] = value.to(self.values[layer].device).transpose(0, 1)

    def copy(self, source: range, target: range, length: int) -> None:
        """Copy the first positions of a run to another one."""
        for buffer in (*self.keys, *self.values):
            buffer[target.start : target.start + length] = buffer[source.start : source.start + length]


def bytes_per_position(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """What one position takes in all layers, in bytes."""
    return sum(shape.size for shape in shapes) * dtype.itemsize


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, they take memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    memory = mmap.mmap(-1, math.prod(size) * dtype.itemsize, **_PRIVATE)
    return torch.frombuffer(memory, dtype=dtype).view(*size)


# A shared one would take memory where it is read, too. Windows knows no such flags.
_PRIVATE = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
