"""How the positions of a packed row see each other: group by group, and nothing across groups.

A group is one source with its targets. For a decoder-only model both are in one row. For an encoder-decoder the
sources are in the encoder's row and the targets in the decoder's, and each group's targets see their own source.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefixtune.prefix.geometry import Site

__all__ = ["Group", "Packing"]


@dataclass(frozen=True)
class Group:
    """One source and its targets, one after the other in a packed row.

    Every target sees the source and itself, never another target; the source sees itself alone.

    Attributes:
        start: Where the source begins in the row.
        source_length: Positions of the shared source; may be 0.
        target_lengths: Positions of each target.
        hidden: Positions of the prefix that neither source nor targets see: of the sites `encoder` and `cross` of an
            encoder-decoder, else of `decoder`.
    """

    start: int
    source_length: int
    target_lengths: tuple[int, ...]
    hidden: tuple[int, ...] = ()

    @property
    def stop(self) -> int:
        """Where the last target ends in the row."""
        return self.start + self.source_length + sum(self.target_lengths)

    def positions(self) -> Int[Tensor, " N"]:
        """Text positions: each target continues where the source ends."""
        targets = [torch.arange(length) + self.source_length for length in self.target_lengths]
        return torch.cat([torch.arange(self.source_length), *targets])

    def mask(self, window: int | None = None) -> Bool[Tensor, "N N"]:
        """Which position (row) sees which (column).

        Args:
            window: Only the nearest `window` text positions are visible; None: all.
        """
        lengths = torch.tensor([self.source_length, *self.target_lengths])
        part = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        visible = (part[None, :] == 0) | (part[None, :] == part[:, None])
        visible = visible.tril()
        if window is not None:
            position = self.positions()
            visible &= position[:, None] - position[None, :] < window
        return visible


@dataclass(frozen=True)
class Packing:
    """The groups of a packed row.

    Attributes:
        groups: In the order of the row; for an encoder-decoder, of the decoder's row, with sources of length 0.
        sources: Encoder-decoder only: positions of each group's source in the encoder's row.
        prefix_index: Which of several prefixes is in front of each group; None: one prefix for all groups.
        cache: What is computed once for all layers of a row.
    """

    groups: tuple[Group, ...]
    sources: tuple[int, ...] | None = None
    prefix_index: tuple[int, ...] | None = None
    cache: dict[tuple[Any, ...], Any] = field(default_factory=dict, compare=False, repr=False)

    def positions(self, site: Site = "decoder") -> Int[Tensor, "1 T"]:
        """Text positions of the row, without the prefix's shift; of the encoder's row for the site `encoder`."""
        if site == "encoder":
            return torch.cat([torch.arange(length) for length in self.sources or ()])[None]
        return torch.cat([group.positions() for group in self.groups])[None]

    def shifts(self, lengths: Sequence[int]) -> Int[Tensor, "1 T"]:
        """How far the prefix before each position of the row moves it, for prefixes of these lengths."""
        prefix_index = self.prefix_index or (0,) * len(self.groups)
        sizes = torch.tensor([group.stop - group.start for group in self.groups])
        return torch.repeat_interleave(torch.tensor([lengths[index] for index in prefix_index]), sizes)[None]

    def sizes(self, site: Site) -> tuple[list[int], list[int]]:
        """Per group, how many queries and how many keys it has at a site."""
        own = [group.stop - group.start for group in self.groups]
        sources = list(self.sources or ())
        return {"decoder": (own, own), "encoder": (sources, sources), "cross": (own, sources)}[site]

    def masks(
        self,
        site: Site,
        prefix_lengths: Sequence[int],
        window: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Sequence[Float[Tensor, "N S"] | None]:
        """Per group, a mask (N, P + S) to add to scores, computed once per row. None: everything is visible.

        Args:
            site: Where.
            prefix_lengths: P before each group.
            window: Only the nearest `window` text positions are visible; None: all.
            dtype: Of the masks.
            device: Where they are.
        """
        if site != "decoder" and not any(group.hidden for group in self.groups):
            return [None] * len(self.groups)
        key = (site, tuple(prefix_lengths), window, dtype, device)
        if key not in self.cache:
            self.cache[key] = [
                None if visible is None else _additive(visible, dtype).to(device)
                for visible in self._visible(site, prefix_lengths, window)
            ]
        masks: list[Tensor | None] = self.cache[key]
        return masks

    def hides_at(self, site: Site) -> bool:
        """Whether `Group.hidden` is of this site."""
        return site in (("decoder",) if self.sources is None else ("encoder", "cross"))

    def _visible(
        self, site: Site, prefix_lengths: Sequence[int], window: int | None
    ) -> Iterator[Bool[Tensor, "N S"] | None]:
        """Per group, which query (row) sees which of the prefix's positions and keys (column); None: all."""
        hides = self.hides_at(site)
        for group, length, queries, keys in zip(self.groups, prefix_lengths, *self.sizes(site), strict=True):
            hidden = [position for position in group.hidden if position < length] if hides else []
            if site != "decoder" and not hidden:
                yield None
                continue
            text = group.mask(window) if site == "decoder" else torch.ones(queries, keys, dtype=torch.bool)
            visible = nn.functional.pad(text, (length, 0), value=True)
            visible[:, hidden] = False
            yield visible


def _additive(visible: Bool[Tensor, "N S"], dtype: torch.dtype) -> Float[Tensor, "N S"]:
    """A mask to add to scores: 0 where a position is visible, minus infinity elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))
