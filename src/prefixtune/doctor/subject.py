"""Subject."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.reference import Text, distance
from prefixtune.doctor.state import State
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["LONGER", "Finding", "Subject", "draw"]


LONGER = 2
"""Positions that the second prefix has more than the first."""


@dataclass(frozen=True, eq=False)
class Subject:
    """The backbone under examination, and what it is examined with.

    Attributes:
        backbone: The backbone.
        tolerance: How far apart equal things may be.
        effect: What a prefix must change in the outputs at least.
        first: A prefix of P positions at every site.
        second: A longer one.
        layer_effects: Site and number of a layer -> what replacing that layer of `first` changes in its output.
        layer_bounds: The same -> what it must change at least.
        strength: What the values were multiplied by for that.
        vocabulary: Ordinary token ids.
        generator: Draws them.
        before: The model's state at the start.
    """

    backbone: Backbone
    tolerance: float
    effect: float
    first: Prefix
    second: Prefix
    layer_effects: dict[tuple[Site, int], float]
    layer_bounds: dict[tuple[Site, int], float]
    strength: float
    vocabulary: Tensor
    generator: torch.Generator
    before: State

    @property
    def exact(self) -> bool:
        """Whether decoded tokens must be the same."""
        return self.backbone.dtype not in (torch.bfloat16, torch.float16)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where prefixes stand."""
        return self.first.sites

    @property
    def outputs(self) -> str:
        """What the model gives, in words."""
        return "hidden states" if self.backbone.kind == "encoder" else "logits"

    def distance(self, ones: Sequence[Tensor], references: Sequence[Tensor]) -> float:
        """How far apart things are that should be equal, or that a prefix should change."""
        return distance(ones, references, self.backbone.dtype)

    def same(self, what: str, distance: float, tolerance: float = 0.0) -> tuple[bool, str]:
        """Whether things are equal, at most as far apart as is tolerated."""
        bound = max(tolerance, self.tolerance)
        return distance <= bound, f"{what} differ by {distance:.1e} (at most {bound:g})"

    def ids(self, *lengths: int) -> list[list[int]]:
        """Random token ids."""
        return [draw(self.vocabulary, length, self.generator) for length in lengths]

    def texts(self, *lengths: int) -> list[Text]:
        """Random texts; an encoder-decoder's targets have the same lengths in reverse."""
        rows = self.ids(*lengths)
        if self.backbone.kind != "encoder-decoder":
            return [Text(row) for row in rows]
        return [Text(row, target) for row, target in zip(rows, self.ids(*lengths[::-1]), strict=True)]


Finding = tuple[bool, str] | None
"""Whether a check passed, and its detail; None: there is no occasion for it."""


def draw(vocabulary: Tensor, length: int, generator: torch.Generator) -> list[int]:
    """Random token ids."""
    ids: list[int] = vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)].tolist()
    return ids
