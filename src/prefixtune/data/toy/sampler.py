"""A sampler of balanced values, for all sets made here.

Equal seeds give equal sets on every version of Python: only `random.Random(seed).random()` is used, the one method
whose sequence Python guarantees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

_Value = TypeVar("_Value")


class BalancedSampler:
    """Draws values from named lists: each list is shuffled, used up, and shuffled again.

    So all values of a list are about equally frequent, and each occurs within as many draws as the list has values.

    Args:
        seed: >= 0.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._remaining: dict[str, list[int]] = {}

    def integer(self, limit: int) -> int:
        """An integer from 0 to `limit` - 1."""
        return int(self._rng.random() * limit)

    def draw(self, name: str, values: Sequence[_Value]) -> _Value:
        """The next value of a list.

        Args:
            name: The list's name.
            values: Its values; the same at each call.
        """
        remaining = self._remaining.get(name)
        if not remaining:
            remaining = self._remaining[name] = list(range(len(values)))
            for last in range(len(remaining) - 1, 0, -1):
                other = self.integer(last + 1)
                remaining[last], remaining[other] = remaining[other], remaining[last]
        return values[remaining.pop()]
