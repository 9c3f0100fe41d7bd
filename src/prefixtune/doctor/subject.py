"""The backbone under examination, and the random prefixes and texts that it is examined with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.doctor.reference import Text, relative_difference
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["EXTRA_POSITIONS", "CheckResult", "Subject", "random_ids"]


EXTRA_POSITIONS = 2
"""How much longer the second prefix is than the first."""


CheckResult = tuple[bool, str] | None
"""Whether a check passed, and its figures in words; None: it does not apply to the backbone."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What every check gets.

    Attributes:
        backbone: The backbone.
        tolerance: Largest relative difference between results that should be equal.
        min_effect: Least change that a prefix must make in the outputs.
        first: A prefix of P positions at every site.
        second: A longer prefix.
        layer_effects: Site and index of a layer -> how much its output changes when that layer of `first` is replaced.
        layer_bounds: Site and index of a layer -> how much it must change at least.
        strength: What the prefixes' values were multiplied by for that.
        vocabulary: Ordinary token ids.
        generator: Draws from it.
    """

    backbone: Backbone
    tolerance: float
    min_effect: float
    first: Prefix
    second: Prefix
    layer_effects: dict[tuple[Site, int], float]
    layer_bounds: dict[tuple[Site, int], float]
    strength: float
    vocabulary: Tensor
    generator: torch.Generator

    @property
    def is_exact(self) -> bool:
        """Whether decoded tokens must be the same: not in half precision, where rounding may flip one."""
        return self.backbone.dtype not in (torch.bfloat16, torch.float16)

    @property
    def sites(self) -> tuple[Site, ...]:
        """Where the backbone takes prefixes."""
        return self.first.sites

    @property
    def output_name(self) -> str:
        """What the model's outputs are, in words."""
        return "hidden states" if self.backbone.kind == "encoder" else "logits"

    def difference(self, tensors: Sequence[Tensor], references: Sequence[Tensor]) -> float:
        """`relative_difference` in the backbone's dtype."""
        return relative_difference(tensors, references, self.backbone.dtype)

    def check_equal(self, name: str, difference: float, tolerance: float = 0.0) -> tuple[bool, str]:
        """Whether a difference is within the tolerance, and the figures in words."""
        bound = max(tolerance, self.tolerance)
        return difference <= bound, f"{name} differ by {difference:.1e} (at most {bound:.2g})"

    def ids(self, *lengths: int) -> list[list[int]]:
        """Random token ids."""
        return [random_ids(self.vocabulary, length, self.generator) for length in lengths]

    def texts(self, *lengths: int) -> list[Text]:
        """Random texts; an encoder-decoder's targets have the same lengths in reverse."""
        rows = self.ids(*lengths)
        if self.backbone.kind != "encoder-decoder":
            return [Text(row) for row in rows]
        return [Text(row, target) for row, target in zip(rows, self.ids(*lengths[::-1]), strict=True)]


def random_ids(vocabulary: Tensor, length: int, generator: torch.Generator) -> list[int]:
    """Random token ids."""
    ids: list[int] = vocabulary[torch.randint(len(vocabulary), (length,), generator=generator)].tolist()
    return ids
