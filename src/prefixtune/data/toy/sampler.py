"""What the sets made here share: cards dealt from shuffled decks, and the check of the sizes asked for.

The same seed gives the same set on every version of Python: only `random.Random(seed).random()` is used, the one
method whose sequence Python promises to keep.

Knows nothing of any one set.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

from prefixtune.errors import ConfigError

__all__ = ["LARGEST", "BalancedSampler", "check_sizes"]


#: The most examples of a part.
LARGEST = 10_000
_Card = TypeVar("_Card")


class BalancedSampler:
    """Deals values from named decks: each is shuffled, dealt to its end and shuffled again.

    So all values of a deck are about equally frequent, and after as many deals as it has cards each has occurred.

    Args:
        seed: Of the shuffling; >= 0.
    """

    def __init__(self, seed: int) -> None:
        self._rng = random.Random(seed)
        self._decks: dict[str, list[int]] = {}

    def below(self, limit: int) -> int:
        """An integer from 0 to `limit` - 1."""
        return int(self._rng.random() * limit)

    def deal(self, deck: str, cards: Sequence[_Card]) -> _Card:
        """The next card of a deck.

        Args:
            deck: Its name.
            cards: What it is made of; the same at each call.
        """
        left = self._decks.get(deck)
        if not left:
            left = self._decks[deck] = list(range(len(cards)))
            for last in range(len(left) - 1, 0, -1):
                other = self.below(last + 1)
                left[last], left[other] = left[other], left[last]
        return cards[left.pop()]


def check_sizes(name: str, seed: int, train: int, held_out: int, *, least: int, hint: str) -> None:
    """Check what a set is asked for.

    Args:
        name: Of the set, for messages.
        seed: >= 0.
        train: Number of training examples; `least` to 10,000.
        held_out: Number of held-out examples; 0 to 10,000.
        least: The fewest training examples.
        hint: The next step.

    Raises:
        ConfigError: A number is out of range; all faults are listed at once.
    """
    faults = [
        f"{part} is {value!r}; allowed: {low} to {LARGEST:,}."
        for part, value, low in (("train", train, least), ("held_out", held_out, 0))
        if not low <= value <= LARGEST
    ]
    if seed < 0:
        faults.append(f"seed is {seed!r}; allowed: 0 and more.")
    if faults:
        raise ConfigError(f"{name} set: {' '.join(faults)}", hint=hint)
