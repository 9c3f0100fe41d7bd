"""How keys turn with position: moving a prefix on, without its model.

In a rotary model a key at position p is the key at position 0 with pairs of its numbers turned by the angle
p * frequency (Su et al. 2021, RoFormer, equation 13). So a prefix computed at positions 0 .. P - 1 becomes the one at
positions n .. n + P - 1 by turning its keys by n * frequency; values have no position. `attention.rotation` finds pairs
and frequencies of every layer by running the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, Field
from pydantic.dataclasses import dataclass as checked_dataclass
from torch import Tensor

from prefixtune.errors import CheckpointError, short_repr
from prefixtune.prefix.geometry import Geometry, Site
from prefixtune.prefix.prefix import Prefix

Positions = Literal["rotary", "none", "absolute"]
"""How a model's keys depend on position.

`rotary`: they turn, so that a prefix can be moved on exactly. `none`: they do not depend on it (a relative or no bias,
encoders and encoder-decoders, whose text is not shifted): nothing is to be done, exactly. `absolute`: positions are
added to the input (GPT-2, OPT), so that keys at other positions are other keys: they are left as they are, which is an
approximation.
"""

_MAX_LAYERS, _MAX_PAIRS = 4096, 4096
_Index = Annotated[int, Field(ge=0, le=2 * _MAX_PAIRS, strict=True)]
_Indices = Annotated[tuple[_Index, ...], Field(min_length=1, max_length=_MAX_PAIRS)]
_Frequency = Annotated[float, Field(ge=-math.pi, le=math.pi, strict=True)]
_HINT = "get the file again, or `prefixtune compose --backbone NAME`: the rotation is then found by running it."


@checked_dataclass(frozen=True)
class PairTurns:
    """Which numbers of a key turn together, and how fast; one pair for each entry of the lists.

    Attributes:
        first: Index of each pair's first number in a head's key; indices in no pair do not turn.
        second: Index of its second number: first + D / 2 in LLaMA, first + 1 where pairs are interleaved (GPT-J).
        frequencies: Radians per position.

    Raises:
        ValueError: They do not fit together.
    """

    first: _Indices
    second: _Indices
    frequencies: tuple[_Frequency, ...]

    def __post_init__(self) -> None:
        indices = {*self.first, *self.second}
        if not len(self.first) == len(self.second) == len(self.frequencies) == len(indices) / 2:
            raise ValueError("its pairs do not fit together")

    def __call__(self, keys: Float[Tensor, "*_ P D"], offset: int) -> Float[Tensor, "*_ P D"]:
        """Keys `offset` positions further on, in their own dtype; computed in float32."""
        angles, exact = torch.tensor(self.frequencies, dtype=torch.float64) * offset, keys.float()
        cos, sin = angles.cos().to(exact), angles.sin().to(exact)
        first, second, turned = list(self.first), list(self.second), exact.clone()
        turned[..., first] = exact[..., first] * cos - exact[..., second] * sin
        turned[..., second] = exact[..., second] * cos + exact[..., first] * sin
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

    def check(self, geometry: Geometry) -> None:
        """Refuse a rotation that is of another model.

        Args:
            geometry: Shapes of a prefix's layers.

        Raises:
            CheckpointError: Its layers are others, or it turns numbers that a key does not have.
        """
        for site in geometry if self.positions == "rotary" else ():
            turns, shapes = self.layers.get(site, ()), geometry[site]
            sizes = [0 if turn is None else 1 + max(*turn.first, *turn.second) for turn in turns]
            if len(sizes) != len(shapes) or any(n > shape.key_dim for n, shape in zip(sizes, shapes, strict=True)):
                raise CheckpointError(f"the rotation is not that of the prefix's layers at site {site!r}.", hint=_HINT)

    def turn(self, prefix: Prefix, offset: int) -> Prefix:
        """A prefix with its keys moved on by some positions; values, header and head stay.

        Computed in float32, returned in the prefix's dtype; differentiable.

        Args:
            prefix: Of this rotation's backbone.
            offset: How far; negative: back.

        Raises:
            CheckpointError: The prefix has other layers.
        """
        if offset == 0 or not self.layers:
            return prefix
        self.check({site: shapes for site, shapes in prefix.geometry.items() if site in self.layers})
        turned = {
            site: tuple(
                (key if turn is None else turn(key, offset), value)
                for turn, (key, value) in zip(self.layers.get(site, [None] * len(pairs)), pairs, strict=True)
            )
            for site, pairs in prefix.layers.items()
        }
        return Prefix(turned, prefix.header, prefix.head)

    def to_header(self) -> dict[str, Any]:
        """What an artifact's header keeps of it, so that joining needs no model; `docs/format.md` has the fields."""
        kinds = list(dict.fromkeys(turn for turns in self.layers.values() for turn in turns if turn is not None))
        layers = {
            site: [None if turn is None else kinds.index(turn) for turn in turns] for site, turns in self.layers.items()
        }
        stored = _StoredRotation(positions=self.positions, max_positions=self.max_positions, turns=kinds, layers=layers)
        return stored.model_dump(mode="json", exclude_defaults=True)

    @classmethod
    def from_header(cls, value: object, geometry: Geometry | None = None) -> Rotation:
        """Read what `to_header` wrote; it may come from anybody.

        Args:
            value: From a header.
            geometry: Shapes of the prefix's layers; None: they are not compared.

        Raises:
            CheckpointError: It is something else, or of other layers.
        """
        try:
            stored = _StoredRotation.model_validate(value)
            layers: dict[Site, tuple[PairTurns | None, ...]] = {
                site: tuple(None if number is None else stored.turns[number] for number in numbers)
                for site, numbers in stored.layers.items()
            }
            if (stored.positions == "rotary") != any(map(any, layers.values())):
                raise ValueError(f"its positions are {stored.positions!r}, which its layers do not suit")
        except (ValueError, IndexError) as error:
            raise CheckpointError(f"the header's rotation is wrong: {short_repr(str(error))}.", hint=_HINT) from error
        found = cls(stored.positions, layers, stored.max_positions)
        found.check(geometry or {})
        return found


class _StoredRotation(BaseModel):
    """In a header, layers name their turns by number."""

    positions: Positions
    max_positions: Annotated[int, Field(ge=1, strict=True)] | None = None
    turns: list[PairTurns] = Field([], max_length=_MAX_LAYERS)
    layers: dict[Site, Annotated[list[_Index | None], Field(max_length=_MAX_LAYERS)]] = {}


def rotary_settings(config: Any) -> list[Mapping[str, Any]]:
    """A model's rotary settings, one for each kind of layers; one where all share them.

    Args:
        config: The text configuration, of any version of transformers.
    """
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    return [one for one in settings.values() if isinstance(one, Mapping)] or [settings]


def length_dependent_turn(config: Any) -> str | None:
    """The kind of rotary frequencies that change with the text's length, `dynamic` or `longrope`; None: none do.

    Args:
        config: As for `rotary_settings`.
    """
    kinds = [settings.get("rope_type") or settings.get("type") for settings in rotary_settings(config)]
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)


def longrope_limit(config: Any) -> int | None:
    """The number of positions beyond which all keys turn by other frequencies (LongRoPE); None: there is none.

    Args:
        config: As for `rotary_settings`.
    """
    limits = [
        settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for settings in rotary_settings(config)
        if settings.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)
