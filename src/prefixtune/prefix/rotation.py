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
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError, short_repr
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
_Index = Annotated[int, Field(ge=0, le=2 * _MAX_PAIRS)]
_HINT = "get the file again, or `prefixtune compose --backbone NAME`: the rotation is then found by running it."
_PROBED, _MAX_ANGLE = 4096, 0.02
"""Two rotations are the same if no key differs by more than this angle, in radians, after this many positions.

As found in bfloat16 and in float32, those of one model differ by up to 0.012.
"""


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

    def frequency_of(self) -> dict[tuple[int, int], float]:
        """The frequency of each pair, from its smaller index to its larger."""
        pairs = zip(self.first, self.second, self.frequencies, strict=True)
        return {(min(i, j), max(i, j)): frequency if i < j else -frequency for i, j, frequency in pairs}


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
            if len(turns) != len(shapes):
                raise CheckpointError(
                    f"the rotation has {len(turns)} layers at site {site!r}, but the prefix has {len(shapes)}.",
                    hint=_HINT,
                )
            for turn, shape in zip(turns, shapes, strict=True):
                most = -1 if turn is None else max(*turn.first, *turn.second)
                if most >= shape.key_dim:
                    raise CheckpointError(
                        f"keys of {shape.key_dim} numbers cannot turn as the rotation says: it pairs number {most}.",
                        hint=_HINT,
                    )

    def differs_in(self, other: Rotation) -> str:
        """What is not the same in another rotation, in words; empty: they turn alike.

        Frequencies that were found in another dtype differ a little, and a pair that hardly turns may not be found.
        """
        for name in ("positions", "max_positions"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"{name} ({mine} and {theirs})"
        if {site: len(turns) for site, turns in self.layers.items()} != {
            site: len(turns) for site, turns in other.layers.items()
        }:
            return "the number of layers"
        span = min(self.max_positions or _PROBED, _PROBED)
        for site, turns in self.layers.items():
            for layer, (one, two) in enumerate(zip(turns, other.layers[site], strict=True)):
                if one == two:
                    continue
                mine, theirs = ({} if turn is None else turn.frequency_of() for turn in (one, two))
                for pair in mine.keys() | theirs.keys():
                    if abs(mine.get(pair, 0.0) - theirs.get(pair, 0.0)) * span > _MAX_ANGLE:
                        what = "a frequency" if pair in mine and pair in theirs else "the numbers that turn together"
                        return f"{what} of layer {layer}"
        return ""

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
            return _StoredRotation.model_validate(value).read()
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"the header's rotation cannot be used: {short_repr(str(error))}.", hint=_HINT
            ) from error


def _turns_to_header(turns: PairTurns) -> dict[str, Any]:
    return {"first": list(turns.first), "second": list(turns.second), "frequencies": list(turns.frequencies)}


class _StoredTurns(BaseModel):
    model_config = ConfigDict(strict=True)

    first: list[_Index] = Field(min_length=1, max_length=_MAX_PAIRS)
    second: list[_Index]
    frequencies: list[Annotated[float, Field(ge=-math.pi, le=math.pi, allow_inf_nan=False)]]

    def read(self) -> PairTurns:
        """The turns.

        Raises:
            ValueError: The lists do not fit together.
        """
        indices = [*self.first, *self.second]
        if not len(self.first) == len(self.second) == len(self.frequencies) or len(set(indices)) < len(indices):
            raise ValueError("its pairs do not fit together")
        return PairTurns(tuple(self.first), tuple(self.second), tuple(self.frequencies))


class _StoredRotation(BaseModel):
    model_config = ConfigDict(strict=True)

    positions: Positions
    max_positions: Annotated[int, Field(ge=1)] | None = None
    turns: list[_StoredTurns] = Field([], max_length=_MAX_LAYERS)
    layers: dict[Site, Annotated[list[_Index | None], Field(max_length=_MAX_LAYERS)]] = {}

    def read(self) -> Rotation:
        """The rotation.

        Raises:
            ValueError: Layers name no turns, or do not suit the positions.
        """
        kinds = [turns.read() for turns in self.turns]
        layers: dict[Site, tuple[PairTurns | None, ...]] = {
            site: tuple(None if number is None else kinds[number] for number in numbers)
            for site, numbers in self.layers.items()
        }
        if (self.positions == "rotary") != any(turn is not None for turns in layers.values() for turn in turns):
            raise ValueError(f"its positions are {self.positions!r}, which its layers do not suit")
        return Rotation(self.positions, layers, self.max_positions)


def rotary_settings(config: Any) -> dict[str, Mapping[str, Any]]:
    """A model's rotary settings by the kind of its layers; where all share them, as `full_attention`.

    Args:
        config: The text configuration, of any version of transformers.
    """
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    nested = {kind: one for kind, one in settings.items() if isinstance(one, Mapping)}
    return nested or {"full_attention": settings}


def length_dependent_turn(config: Any) -> str | None:
    """The kind of rotary frequencies that change with the text's length, `dynamic` or `longrope`; None: none do.

    Args:
        config: As for `rotary_settings`.
    """
    kinds = [settings.get("rope_type") or settings.get("type") for settings in rotary_settings(config).values()]
    return next((kind for kind in kinds if kind in ("dynamic", "longrope")), None)


def longrope_limit(config: Any) -> int | None:
    """The number of positions beyond which all keys turn by other frequencies (LongRoPE); None: there is none.

    Args:
        config: As for `rotary_settings`.
    """
    limits = [
        settings.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
        for settings in rotary_settings(config).values()
        if settings.get("rope_type") == "longrope"
    ]
    return min((int(limit) for limit in limits if limit), default=None)
