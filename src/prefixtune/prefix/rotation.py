"""How keys turn with position: moving a prefix on, without its model.

In a rotary model a key at position p is the key at position 0 with pairs of its numbers turned by the angle
p * frequency (Su et al. 2021, RoFormer, equation 13). So a prefix computed at positions 0 .. P - 1 becomes the one at
positions n .. n + P - 1 by turning its keys by n * frequency; values have no position. `attention.rotation` finds pairs
and frequencies of every layer by running the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.prefix.geometry import SITES, Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["PairTurns", "Positions", "Rotation"]

Positions = Literal["rotary", "none", "absolute"]
"""How a model's keys depend on position.

`rotary`: they turn, so that a prefix can be moved on exactly. `none`: they do not depend on it (a relative or no bias,
encoders and encoder-decoders, whose text is not shifted): nothing is to be done, exactly. `absolute`: positions are
added to the input (GPT-2, OPT), so that keys at other positions are other keys: they are left as they are, which is an
approximation.
"""

_MAX_LAYERS, _MAX_PAIRS, _MAX_POSITION = 4096, 4096, 2**31


@dataclass(frozen=True)
class PairTurns:
    """Which numbers of a key turn together, and how fast; one pair for each entry of the lists.

    Attributes:
        first: Index of each pair's first number in a head's key; indices in no pair do not turn.
        second: Index of its second number: first + D / 2 in LLaMA, first + 1 where pairs are interleaved (GPT-J).
        frequencies: Radians per position.
    """

    first: tuple[int, ...]
    second: tuple[int, ...]
    frequencies: tuple[float, ...]

    def __call__(self, keys: Float[Tensor, "*_ P D"], offset: int) -> Float[Tensor, "*_ P D"]:
        """Keys `offset` positions further on, in their own dtype; computed in float32.

        Raises:
            ConfigError: A key has fewer numbers than the pairs need.
        """
        size = keys.shape[-1]
        if max(*self.first, *self.second) >= size:
            raise ConfigError(
                f"keys of {size} numbers cannot turn as the rotation says: it pairs number "
                f"{max(*self.first, *self.second)}.",
                hint="use the rotation of the prefix's own backbone.",
            )
        angles = torch.tensor(self.frequencies, dtype=torch.float64) * offset
        first, second = torch.tensor(self.first), torch.tensor(self.second)
        partner = torch.arange(size).index_copy(0, first, second).index_copy(0, second, first)
        cos = torch.ones(size, dtype=torch.float64).index_copy(0, torch.cat([first, second]), angles.cos().repeat(2))
        sin = torch.zeros(size, dtype=torch.float64)
        sin = sin.index_copy(0, first, -angles.sin()).index_copy(0, second, angles.sin())
        exact = keys.float()
        turned = exact * cos.to(exact) + exact[..., partner.to(keys.device)] * sin.to(exact)
        return turned.to(keys.dtype)


@dataclass(frozen=True)
class Rotation:
    """How each layer's keys of a backbone turn with position.

    Attributes:
        positions: Whether keys turn, do not depend on position, or depend on it in a way that cannot be moved on.
        layers: Site -> per layer its turns; None: a layer without positions. Sites that do not turn are not in it.
        max_positions: How many positions the model was made for; None: unknown, or any number.
    """

    positions: Positions
    layers: Mapping[Site, tuple[PairTurns | None, ...]] = field(default_factory=dict)
    max_positions: int | None = None

    @property
    def is_exact(self) -> bool:
        """Whether a moved prefix is what the model would have computed at the new positions."""
        return self.positions != "absolute"

    def turn(self, prefix: Prefix, offset: int) -> Prefix:
        """A prefix with its keys moved on by some positions; values, header and head stay.

        Computed in float32, returned in the prefix's dtype; differentiable.

        Args:
            prefix: Of this rotation's backbone.
            offset: How far; negative: back.

        Raises:
            ConfigError: The prefix has other layers.
        """
        if offset == 0 or not self.layers:
            return prefix
        turned = dict(prefix.layers)
        for site, turns in self.layers.items():
            if site not in prefix.layers:
                continue
            if len(turns) != len(prefix.layers[site]):
                raise ConfigError(
                    f"the rotation has {len(turns)} layers at site {site!r}, but the prefix has "
                    f"{len(prefix.layers[site])}.",
                    hint="use the rotation of the prefix's own backbone.",
                )
            turned[site] = tuple(
                (key if turn is None else turn(key, offset), value)
                for turn, (key, value) in zip(turns, prefix.layers[site], strict=True)
            )
        return Prefix(turned, prefix.header, prefix.head)

    def to_header(self) -> dict[str, Any]:
        """What an artifact's header keeps of it, so that joining needs no model; `docs/format.md` has the fields."""
        kinds: list[PairTurns] = []
        layers: dict[str, list[int | None]] = {}
        for site, turns in self.layers.items():
            for turn in turns:
                if turn is not None and turn not in kinds:
                    kinds.append(turn)
            layers[site] = [None if turn is None else kinds.index(turn) for turn in turns]
        value: dict[str, Any] = {"positions": self.positions}
        if self.max_positions is not None:
            value["max_positions"] = self.max_positions
        if layers:
            value |= {"turns": [_turns_to_header(turn) for turn in kinds], "layers": layers}
        return value

    @classmethod
    def from_header(cls, value: object) -> Rotation:
        """Read what `to_header` wrote; it may come from anybody.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            return _read(value)
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise CheckpointError(
                f"the header's rotation cannot be used: {error or type(error).__name__}.",
                hint="get the file again, or name its backbone, so that the rotation is found by running it.",
            ) from error


def _turns_to_header(turns: PairTurns) -> dict[str, Any]:
    return {"first": list(turns.first), "second": list(turns.second), "frequencies": list(turns.frequencies)}


def _read(value: object) -> Rotation:
    if not isinstance(value, Mapping):
        raise ValueError("it is no object")
    positions = value.get("positions")
    if positions not in get_args(Positions):
        raise ValueError(f"its positions are {str(positions)[:40]!r}")
    most = value.get("max_positions")
    if most is not None and not _is_whole(most, 1, _MAX_POSITION):
        raise ValueError(f"its max_positions are {str(most)[:40]!r}")
    kinds = [_read_turns(turns) for turns in _list(value.get("turns", []), _MAX_LAYERS)]
    layers: dict[Site, tuple[PairTurns | None, ...]] = {}
    given = value.get("layers", {})
    if not isinstance(given, Mapping) or not set(given) <= set(SITES):
        raise ValueError("its layers are not by site")
    for site, numbers in given.items():
        numbers = _list(numbers, _MAX_LAYERS)
        if not all(number is None or _is_whole(number, 0, len(kinds) - 1) for number in numbers):
            raise ValueError(f"a layer of {site!r} names no turns")
        layers[site] = tuple(None if number is None else kinds[number] for number in numbers)
    return Rotation(cast(Positions, positions), layers, most)


def _read_turns(value: object) -> PairTurns:
    if not isinstance(value, Mapping):
        raise ValueError("turns are no object")
    first, second = (_list(value[name], _MAX_PAIRS) for name in ("first", "second"))
    frequencies = _list(value["frequencies"], _MAX_PAIRS)
    indices = [*first, *second]
    if not indices or not all(_is_whole(index, 0, 2 * _MAX_PAIRS) for index in indices):
        raise ValueError("a pair has no indices")
    if not len(first) == len(second) == len(frequencies):
        raise ValueError("its lists have different lengths")
    if len(set(indices)) < len(indices):
        raise ValueError("a number belongs to two pairs")
    if not all(_is_number(x) and abs(x) <= math.pi for x in frequencies):
        raise ValueError("a frequency is no number up to pi")
    return PairTurns(tuple(first), tuple(second), tuple(map(float, frequencies)))


def _list(value: object, most: int) -> Sequence[Any]:
    if not isinstance(value, list | tuple) or len(value) > most:
        raise ValueError(f"it has a list that is none, or one of more than {most:,} entries")
    return value


def _is_whole(value: object, lowest: int, highest: int) -> bool:
    return type(value) is int and lowest <= value <= highest


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(cast(float, value))
