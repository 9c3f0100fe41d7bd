"""Keys and values of running texts: one pool per layer, whose size is fixed at the start.

A text has a run of neighbouring positions, as many as it may ever need: its prefix, its prompt and its new tokens. So
its keys are a view of the pool, nothing grows or moves while it runs, and what it may take is known before it starts.
On a CPU the pool takes memory only where it was written. What a text did not write, it never reads.
"""

from __future__ import annotations

import bisect
import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import LayerShape, Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["CUDA_PAGE", "KVCache", "bytes_per_position", "free_memory"]


CUDA_PAGE = 256
"""Positions of a page, of which FlashAttention's tables of pages want a multiple."""


class KVCache:
    """Keys and values of all running texts at one site.

    Args:
        shapes: The layers of the site.
        num_positions: Of all texts together.
        dtype: Of keys and values.
        device: Of keys and values.
        site: The attention whose keys and values these are.
        page: Runs begin and end at multiples of so many positions.

    Attributes:
        num_positions: Whole pages only.
        keys: Per layer, (N, H, Dk).
        values: Per layer, (N, H, Dv).

    Raises:
        ConfigError: Memory has no room for it, or it has no whole page.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        site: Site = "decoder",
        page: int = 1,
    ) -> None:
        self.site, self.page, self.num_positions = site, page, num_positions // page * page
        self.bytes_per_position = bytes_per_position(shapes, dtype)
        size = self.num_positions * self.bytes_per_position / 2**30
        hint = "set another kv_cache_mib."
        if not self.num_positions:
            raise ConfigError(f"memory for keys and values has no room for {page} positions.", hint=hint)
        try:
            self.keys: list[Float[Tensor, "N H Dk"]] = [
                torch.empty(self.num_positions, shape.num_kv_heads, shape.key_dim, dtype=dtype, device=device)
                for shape in shapes
            ]
            self.values: list[Float[Tensor, "N H Dv"]] = [
                torch.empty(self.num_positions, shape.num_kv_heads, shape.value_dim, dtype=dtype, device=device)
                for shape in shapes
            ]
        # Torch's own of a CPU, and its error of a GPU.
        except RuntimeError as error:
            raise ConfigError(f"there is no room for {size:,.1f} GiB of keys and values.", hint=hint) from error
        # Runs, by their start; neighbours are one.
        self._free = [range(self.num_positions)]

    def take(self, length: int) -> range | None:
        """A run of positions that nobody has, at least `length`; None: there is no room now."""
        size = -(-length // self.page) * self.page
        for index, free in enumerate(self._free):
            if len(free) >= size:
                rest = free[size:]
                self._free[index : index + 1] = [rest] if rest else []
                return free[:size]
        return None

    def give_back(self, run: range) -> None:
        """Let others have a run."""
        index = bisect.bisect(self._free, run.start, key=lambda free: free.start)
        before, after = self._free[:index], self._free[index:]
        if before and before[-1].stop == run.start:
            run = range(before.pop().start, run.stop)
        if after and after[0].start == run.stop:
            run = range(run.start, after.pop(0).stop)
        self._free = [*before, run, *after]

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

    @property
    def num_bytes(self) -> int:
        """Size of the pool."""
        return self.num_positions * self.bytes_per_position

    @property
    def used_bytes(self) -> int:
        """What running texts have of it."""
        return (self.num_positions - sum(map(len, self._free))) * self.bytes_per_position


def bytes_per_position(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """What one position takes in all layers, in bytes."""
    return sum(shape.size for shape in shapes) * dtype.itemsize


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take; on a CPU without the system's own word for it, half of the machine's."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    limits = [2**63]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits[1:] = [int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024]
    # Of a container.
    with contextlib.suppress(OSError, ValueError):
        most, used = (
            int(Path("/sys/fs/cgroup", name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current")
        )
        limits.append(max(0, most - used))
    return min(limits)
