"""Keys and values of running texts: one pool of pages per layer, whose size is fixed at the start.

A text has as many pages as it may ever need: for its prefix, its prompt and its new tokens. So nothing grows while it
runs, and what it may take is known before it starts. Whole pages at the beginning of a text may belong to several
texts. On a CPU the pool takes memory only where it was written. A page that no text has any more is wiped: what is on
it must not reach another text, not even as NaN behind a mask.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, pairwise

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import LayerShape, Site
from prefixtune.prefix.prefix import Prefix

PAGE, FLASH_PAGE = 16, 256
"""Positions of a page; FlashAttention's tables take multiples of 256 alone."""


@dataclass(frozen=True, eq=False)
class Pages:
    """Where a text is in the pool.

    Attributes:
        numbers: Of its pages, in the order of its positions.
        size: Positions of a page.
        head: Positions of its beginning that other texts may have as well, in whole pages.
        shared: Positions of its beginning that were there already.
    """

    numbers: Sequence[int]
    size: int
    head: int = 0
    shared: int = 0

    @cached_property
    def _pieces(self) -> Sequence[tuple[int, range]]:
        """Stretches of neighbouring places in the pool, each with its first position in the text."""
        breaks = [n for n, (one, other) in enumerate(pairwise(self.numbers), start=1) if other != one + 1]
        starts = [0, *breaks, len(self.numbers)]
        size = self.size
        return [
            (first * size, range(self.numbers[first] * size, (self.numbers[first] + stop - first) * size))
            for first, stop in pairwise(starts)
        ]

    def places(self, start: int, stop: int) -> list[range]:
        """The places of its positions from `start` to `stop` in the pool, neighbours in one range."""
        cut = [places[max(0, start - first) : max(0, stop - first)] for first, places in self._pieces]
        return [places for places in cut if places]


class KVCache:
    """Keys and values of all running texts at one site.

    Args:
        shapes: The layers of the site.
        num_positions: Of all texts together; only whole pages are taken.
        dtype: Of keys and values.
        device: Of keys and values.
        site: The attention whose keys and values these are.
        page: Positions of a page.

    Attributes:
        num_positions: Of all texts together.
        keys: Per layer, (N, H, Dk).
        values: Per layer, (N, H, Dv).
        used: How many texts have a page, by its number.

    Raises:
        ConfigError: Memory has no room for it, or it has no page.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
        site: Site = "decoder",
        page: int = PAGE,
    ) -> None:
        self.site, self.page, self.num_positions = site, page, num_positions // page * page
        hint = "set another kv_cache_mib."
        if not self.num_positions:
            raise ConfigError("memory has no room for keys and values.", hint=hint)
        try:
            self.keys = [_zeros((self.num_positions, s.num_kv_heads, s.key_dim), dtype, device) for s in shapes]
            self.values = [_zeros((self.num_positions, s.num_kv_heads, s.value_dim), dtype, device) for s in shapes]
        except (MemoryError, ValueError, torch.OutOfMemoryError) as error:
            size = self.num_positions * bytes_per_position(shapes, dtype) / 2**30
            raise ConfigError(f"there is no room for {size:,.1f} GiB of keys and values.", hint=hint) from error
        self.used, self._free = Counter[int](), list(range(num_positions // page))

    def take(self, length: int, shared: Sequence[int] = (), head: int = 0) -> Pages | None:
        """Pages for so many positions; None: there is no room now.

        Args:
            length: Positions.
            shared: Pages of another text, with which this one begins.
            head: Positions of its beginning that other texts may have as well.
        """
        wanted, free = -(-length // self.page) - len(shared), self._free
        if wanted > len(free):
            return None
        # Neighbours if there are as many: a CPU attends to them without a copy.
        first = next((n for n in range(len(free) - wanted + 1) if free[n + wanted - 1] - free[n] == wanted - 1), 0)
        numbers = [*shared, *free[first : first + wanted]]
        del free[first : first + wanted]
        self.used.update(numbers)
        return Pages(numbers, self.page, head // self.page * self.page, len(shared) * self.page)

    def give_back(self, pages: Pages, written: int) -> None:
        """Let others have a text's pages, of whose positions so many were written."""
        self.used.subtract(pages.numbers)
        # No text has them any more.
        unused = [number for number in pages.numbers if not self.used[number]]
        places = [place for place in chain(*pages.places(0, written)) if not self.used[place // self.page]]
        if places:
            index = torch.tensor(places, device=self.keys[0].device)
            for buffer in (*self.keys, *self.values):
                buffer.index_fill_(0, index, 0)
        for number in unused:
            del self.used[number]
        self._free = sorted(self._free + unused)

    def put(self, pages: Pages, prefix: Prefix) -> None:
        """Copy what is not there yet of a prefix to the beginning of a text."""
        start = pages.shared
        places = self._index(pages, start, prefix.length(self.site))
        for layer, (key, value) in enumerate(prefix.layers.get(self.site, ())):
            for buffer, part in ((self.keys[layer], key), (self.values[layer], value)):
                buffer[places] = part[:, start:].transpose(0, 1).to(buffer)

    def copy(self, source: Pages, target: Pages, length: int) -> None:
        """Copy what is not there yet of the first positions of a text to another one."""
        here, there = (self._index(pages, target.shared, length) for pages in (source, target))
        for buffer in (*self.keys, *self.values):
            buffer[there] = buffer[here]

    def _index(self, pages: Pages, start: int, stop: int) -> Int[Tensor, " _"]:
        return torch.tensor(list(chain(*pages.places(start, stop))), dtype=torch.long, device=self.keys[0].device)


def bytes_per_position(shapes: Sequence[LayerShape], dtype: torch.dtype) -> int:
    """What one position takes in all layers, in bytes."""
    return sum(shape.size for shape in shapes) * dtype.itemsize


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros; on a CPU, they take memory when they are first written."""
    if device.type != "cpu":
        return torch.zeros(size, dtype=dtype, device=device)
    return torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, np.uint8)).view(dtype).view(*size)
