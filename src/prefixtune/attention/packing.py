"""How the positions of a packed row see each other: group by group, and nothing across groups.

A group is one source with its targets. For a decoder-only model both are in one row. For an encoder-decoder the
sources are in the encoder's row and the targets in the decoder's, and each group's targets see their own source.

`sees` is the rule. The masks of single groups and the function that flex_attention takes are both made of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, no_type_check

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from prefixtune.prefix.geometry import Site

_FAR = 2**30
"""A text position that no window hides, and minus that, a first one that hides nothing."""


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
    def lengths(self) -> tuple[int, ...]:
        """Positions of the source and of each target."""
        return (self.source_length, *self.target_lengths)

    @property
    def stop(self) -> int:
        """Where the last target ends in the row."""
        return self.start + sum(self.lengths)


class Visibility(NamedTuple):
    """What decides who sees whom, in a row in front of which all prefixes stand, one after the other.

    Attributes:
        queries: Of each query: its group, its part of the group (0: the source), its place in the row, the first text
            position that its window shows, and its prefix, as -1 minus the prefix's number. At sites where all of a
            group see each other, parts and places are 0.
        keys: Of each key: its group, part, place and text position, as for queries, and a column of `hidden`. A
            prefix's keys have as their group what queries have as their prefix.
        hidden: For each group, which positions of its prefix it does not see, and False in the last column; None: it
            sees them all.
    """

    queries: Int[Tensor, "5 N"]
    keys: Int[Tensor, "5 S"]
    hidden: Bool[Tensor, "G P"] | None


@no_type_check  # torch traces it
def sees(visibility: Visibility, query: Tensor, key: Tensor) -> Tensor:
    """Whether a query sees a key, both given by their places, as booleans: the rule of packed rows.

    A group sees its prefix, but for positions that are hidden from it; its source sees what is before it in the source,
    and each target that, the source, and what is before it in the target; with a window, of the text the nearest alone.
    """
    queries, keys, hidden = visibility
    group = keys[0, key]
    visible = (group == queries[0, query]) | (group == queries[4, query])
    visible = visible & ((keys[1, key] == 0) | (keys[1, key] == queries[1, query]))
    visible = visible & (keys[2, key] <= queries[2, query]) & (keys[3, key] >= queries[3, query])
    return visible if hidden is None else visible & ~hidden[queries[0, query], keys[4, key]]


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

    @property
    def owners(self) -> tuple[int, ...]:
        """Which prefix is in front of each group."""
        return (0,) * len(self.groups) if self.prefix_index is None else self.prefix_index

    def positions(self, site: Site = "decoder") -> Int[Tensor, "1 T"]:
        """Text positions of the row, without the prefix's shift; of the encoder's row for the site `encoder`."""
        if site == "encoder":
            return _count(self.sources or ())[None]
        # Each target continues where the source ends.
        firsts = [
            0 if part == 0 else group.source_length for group in self.groups for part in range(len(group.lengths))
        ]
        lengths = [length for group in self.groups for length in group.lengths]
        return (_count(lengths) + _repeat(firsts, lengths))[None]

    def shifts(self, lengths: Sequence[int]) -> Int[Tensor, "1 T"]:
        """How far the prefix before each position of the row moves it, for prefixes of these lengths."""
        return _repeat([lengths[owner] for owner in self.owners], self.sizes("decoder")[0])[None]

    def sizes(self, site: Site) -> tuple[list[int], list[int]]:
        """Per group, how many queries and how many keys it has at a site."""
        own = [sum(group.lengths) for group in self.groups]
        sources = list(self.sources or ())
        return {"decoder": (own, own), "encoder": (sources, sources), "cross": (own, sources)}[site]

    def visibility(self, site: Site, prefix_lengths: Sequence[int], window: int | None) -> Visibility:
        """What `sees` goes by, on the CPU.

        Args:
            site: Where.
            prefix_lengths: P of each prefix in front.
            window: Of a decoder's own text, only the nearest `window` positions are visible; None: all.
        """
        own, others = (self._facts(site, sizes) for sizes in self.sizes(site))
        first = torch.full_like(own[3], -_FAR) if window is None or site != "decoder" else own[3] - window + 1
        prefix = -1 - torch.tensor(self.owners, dtype=torch.long)
        hidden = torch.zeros(len(self.groups), max((0, *prefix_lengths)) + 1, dtype=torch.bool)
        if site in (("decoder",) if self.sources is None else ("encoder", "cross")):
            for row, group, owner in zip(hidden, self.groups, self.owners, strict=True):
                row[[place for place in group.hidden if place < prefix_lengths[owner]]] = True
        columns = _count(prefix_lengths)
        numbers = -1 - _repeat(range(len(prefix_lengths)), prefix_lengths)
        fronts = torch.stack([numbers, *(torch.full_like(columns, fact) for fact in (0, -1, _FAR)), columns])
        texts = torch.cat([others, torch.full_like(others[:1], hidden.shape[1] - 1)])
        return Visibility(
            torch.stack([*own[:3], first, prefix[own[0]]]),
            torch.cat([fronts, texts], dim=1),
            hidden if bool(hidden.any()) else None,
        )

    def masks(
        self, site: Site, prefix_lengths: Sequence[int], window: int | None, like: Tensor, repeats: int
    ) -> Sequence[Float[Tensor, "N S"] | None]:
        """Per group, a mask to add to the scores of its prefix and its keys; None: everything is visible.

        Computed once per row.

        Args:
            site: Where.
            prefix_lengths: See `visibility`.
            window: See there.
            like: Of the masks' dtype and device.
            repeats: How many times the queries are repeated, one repetition after the other.
        """
        name = ("masks", site, tuple(prefix_lengths), window, like.dtype, like.device, repeats)
        if name not in self.cache:
            visibility = self.visibility(site, prefix_lengths, window)
            self.cache[name] = [None] * len(self.groups)
            if site == "decoder" or visibility.hidden is not None:
                queries, keys = self.sizes(site)
                columns = torch.arange(visibility.keys.shape[1]).split([*prefix_lengths, *keys])
                fronts, texts = columns[: len(prefix_lengths)], columns[len(prefix_lengths) :]
                rows = torch.arange(sum(queries)).split(queries)
                for number, owner in enumerate(self.owners):
                    seen = sees(visibility, rows[number][:, None], torch.cat([fronts[owner], texts[number]])[None])
                    mask = torch.zeros(seen.shape, dtype=like.dtype).masked_fill_(~seen, float("-inf"))
                    self.cache[name][number] = mask.repeat(repeats, 1).to(like.device)
        masks: list[Tensor | None] = self.cache[name]
        return masks

    def _facts(self, site: Site, sizes: Sequence[int]) -> Int[Tensor, "4 N"]:
        """Of each position of a row: its group, its part, its place and its text position."""
        group = _repeat(range(len(sizes)), sizes)
        if site != "decoder":
            return nn.functional.pad(group[None], (0, 0, 0, 3))
        parts = [part for group in self.groups for part in range(len(group.lengths))]
        part = _repeat(parts, [length for group in self.groups for length in group.lengths])
        return torch.stack([group, part, torch.arange(len(group)), self.positions()[0]])


def _repeat(values: Sequence[int], counts: Sequence[int]) -> Int[Tensor, " N"]:
    return torch.repeat_interleave(torch.tensor(values, dtype=torch.long), torch.tensor(counts, dtype=torch.long))


def _count(lengths: Sequence[int]) -> Int[Tensor, " N"]:
    """0, 1, 2, ... of each length, one after the other."""
    return torch.cat([torch.arange(0), *map(torch.arange, lengths)])
