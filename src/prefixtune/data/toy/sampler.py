"""A sampler of balanced values, and the check of a set's sizes, for all sets made here.

Equal seeds give equal sets on every version of Python: only `random.Random(seed).random()` is used, the one method
whose sequence Python guarantees.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from prefixtune.errors import ConfigError

__all__ = ["MAX_EXAMPLES", "BalancedSampler", "check_sizes"]


#: Most examples of a part.
MAX_EXAMPLES = 10_000
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


def check_sizes(name: str, seed: int, train: int, held_out: int, *, min_train: int, hint: str) -> None:
    """Check the arguments of a set.

    Args:
        name: The set's name, for messages.
        seed: >= 0.
        train: Number of training examples; `min_train` to 10,000.
        held_out: Number of held-out examples; 0 to 10,000.
        min_train: Fewest training examples.
        hint: The next step.

    Raises:
        ConfigError: A number is out of range; all faults are listed at once.
    """
    faults = [
        f"{part} is {value!r}; allowed: {low} to {MAX_EXAMPLES:,}."
        for part, value, low in (("train", train, min_train), ("held_out", held_out, 0))
        if not low <= value <= MAX_EXAMPLES
    ]
    if seed < 0:
        faults.append(f"seed is {seed!r}; allowed: 0 and more.")
    if faults:
        raise ConfigError(f"{name} set: {' '.join(faults)}", hint=hint)
