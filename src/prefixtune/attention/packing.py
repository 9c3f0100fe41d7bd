"""How the positions of a packed row see each other: group by group, and nothing across groups.

A group is one source with its targets. For a decoder-only model both stand in one row. For an encoder-decoder the
sources stand in the encoder's row and the targets in the decoder's, and each group's targets look at their own source.

Knows lengths alone: nothing of tokens, models or prefixes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefixtune.prefix.geometry import Site

__all__ = ["Group", "Packing"]


@dataclass(frozen=True)
class Group:
    """One source and its targets, side by side in a packed row.

    Every target sees the source and itself, never another target; the source sees itself alone.

    Attributes:
        start: Where the source begins in the row.
        source_length: Positions of the shared source; may be 0.
        target_lengths: Positions of each target.
    """

    start: int
    source_length: int
    target_lengths: tuple[int, ...]

    @property
    def stop(self) -> int:
        """Where the last target ends in the row."""
        return self.start + self.source_length + sum(self.target_lengths)

    def positions(self) -> Int[Tensor, " N"]:
        """Text positions: each target goes on where the source ends."""
        targets = [torch.arange(length) + self.source_length for length in self.target_lengths]
        return torch.cat([torch.arange(self.source_length), *targets])

    def in_targets(self) -> Int[Tensor, " N"]:
        """1 where a position belongs to a target, 0 in the source."""
        return (torch.arange(self.stop - self.start) >= self.source_length).long()

    def mask(self, window: int | None = None) -> Bool[Tensor, "N N"]:
        """Which position (row) sees which (column).

        Args:
            window: Only the nearest `window` text positions are visible; None: all.
        """
        lengths = torch.tensor([self.source_length, *self.target_lengths])
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        seen = (part[None, :] == 0) | (part[None, :] == part[:, None])
        seen = seen.tril()
        if window is not None:
            position = self.positions()
            seen &= position[:, None] - position[None, :] < window
        return seen


@dataclass(frozen=True)
class Packing:
    """The groups of a packed row.

    Attributes:
        groups: In the order of the row; for an encoder-decoder, of the decoder's row, with sources of length 0.
        sources: Encoder-decoder only: positions of each group's source in the encoder's row.
        prefix_index: Which of several prefixes stands in front of each group; None: there is one for all.
    """

    groups: tuple[Group, ...]
    sources: tuple[int, ...] | None = None
    prefix_index: tuple[int, ...] | None = None
    _bias: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict, compare=False, repr=False)

    def positions(self, site: Site = "decoder") -> Int[Tensor, "1 T"]:
        """Text positions of the row, without the prefix's shift; of the encoder's row for the site `encoder`."""
        if site == "encoder":
            return torch.cat([torch.arange(length) for length in self.sources or ()])[None]
        return torch.cat([group.positions() for group in self.groups])[None]

    def shifts(self, lengths: Sequence[int]) -> Int[Tensor, "1 T"]:
        """How far the prefix before each position of the row moves it, for prefixes of these lengths."""
        prefix_index = self.prefix_index or (0,) * len(self.groups)
        sizes = torch.tensor([group.stop - group.start for group in self.groups])
        return torch.repeat_interleave(torch.tensor([lengths[owner] for owner in prefix_index]), sizes)[None]

    def in_targets(self) -> Int[Tensor, "1 T"]:
        """1 where a position of the row belongs to a target, 0 in a source."""
        return torch.cat([group.in_targets() for group in self.groups])[None]

    def sizes(self, site: Site) -> tuple[list[int], list[int]]:
        """Per group, how many queries and how many keys it has at a site."""
        own = [group.stop - group.start for group in self.groups]
        sources = list(self.sources or ())
        return {"decoder": (own, own), "encoder": (sources, sources), "cross": (own, sources)}[site]

    def bias(
        self,
        site: Site,
        prefix_lengths: Sequence[int],
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
        *,
        infix: bool = False,
    ) -> Sequence[Float[Tensor, "N S"] | None]:
        """Per group, an additive mask (N, P + S); made once per row, not once per layer. None: all is visible.

        An infix is visible to the targets alone.

        Args:
            site: Where.
            prefix_lengths: P before each group.
            window: Only the nearest `window` text positions are visible; None: all.
            dtype: Of the masks.
            device: Where they are.
            infix: What stands in front is hidden from the sources.
        """
        if site != "decoder":
            return [None] * len(self.groups)
        key = (tuple(prefix_lengths), window, dtype, device, infix)
        if key not in self._bias:
            self._bias[key] = [
                self._bias_of(group, length, window, dtype, infix).to(device)
                for group, length in zip(self.groups, prefix_lengths, strict=True)
            ]
        return self._bias[key]

    @staticmethod
    def _bias_of(
        group: Group, prefix_length: int, window: int | None, dtype: torch.dtype, infix: bool
    ) -> Float[Tensor, "N S"]:
        seen = nn.functional.pad(group.mask(window), (prefix_length, 0), value=True)
        if infix:
            seen[: group.source_length, :prefix_length] = False
        return torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, float("-inf"))
