"""Attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.kernels import ScoreOptions, eager_attention, grouped_attention
from prefixtune.engine.kv_cache import KVCache
from prefixtune.prefix.geometry import Site

__all__ = ["EncoderAttention", "QuerySpan", "SlotAttention"]

_SMALL = 2**20
"""Up to as many numbers in the keys, plain matrix products beat the CPU's fused bf16 kernel (1.4 times at 138 positions
of 32 texts with 3 KV heads of 64)."""
CALL_OVERHEAD = 300
"""What attending to a text by itself costs besides its own length, in positions of a shared call."""


@dataclass(frozen=True)
class QuerySpan:
    """Tokens of one sequence that a step computes.

    Attributes:
        slot: The sequence's slot.
        start: Position in the slot of the first of them; the prefix starts at 0.
        count: How many tokens.
        prefix_length: Length of the sequence's prefix.
    """

    slot: int
    start: int
    count: int
    prefix_length: int

    @property
    def stop(self) -> int:
        """The position after the last of them."""
        return self.start + self.count


@dataclass(frozen=True, eq=False)
class _Layer:
    """How a step attends at one layer."""

    keys: Float[Tensor, "S H C Dk"]
    values: Float[Tensor, "S H _C Dv"]
    scores: ScoreOptions
    window: int | None
    relative: Float[Tensor, "Hq N"] | None

    @property
    def masked_as(self) -> tuple[int | None, int | None]:
        """What layers with one mask have in common."""
        return self.window, None if self.relative is None else self.relative.data_ptr()


@dataclass(eq=False)
class SlotAttention:
    """One forward pass over the next tokens of many texts, as attention sees it.

    Attributes:
        cache: The slots.
        singles: Texts that add one token, by slot; they stand first in the row.
        spans: Texts that add several, behind them.
        relative: Per layer, what is added to scores at each distance; the last holds for all that are farther.
    """

    cache: KVCache
    singles: Sequence[QuerySpan]
    spans: Sequence[QuerySpan]
    relative: Mapping[int, Float[Tensor, "Hq N"]] = field(default_factory=dict)
    _masks: dict[object, Tensor] = field(default_factory=dict, repr=False)
    _span_known: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        device = self.cache.device
        self.slots: Int[Tensor, " B"] = torch.tensor([span.slot for span in self.singles], device=device)
        self.places: Int[Tensor, " B"] = torch.tensor([span.start for span in self.singles], device=device)
        # Slots between those in use are computed, too, and left out.
        self.rows = max((span.slot for span in self.singles), default=-1) + 1
        self.whole = self.rows == len(self.singles)
        self.common = shared_length([span.stop for span in self.singles], self.rows)
        self.alone = [(number, span) for number, span in enumerate(self.singles) if span.stop > self.common]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H T Dk"],
        value: Float[Tensor, "1 H T Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Write the tokens' keys and values into the slots, and attend to what stands there."""
        keys, values = self.cache.keys[layer[1]], self.cache.values[layer[1]]
        count = len(self.singles)
        if count:
            keys[self.slots, :, self.places] = key[0, :, :count].transpose(0, 1)
            values[self.slots, :, self.places] = value[0, :, :count].transpose(0, 1)
        first = count
        for span in self.spans:
            there = slice(first, first + span.count)
            keys[span.slot, :, span.start : span.stop] = key[0, :, there]
            values[span.slot, :, span.start : span.stop] = value[0, :, there]
            first += span.count
        return self.look(layer[1], query, scores, scores.window)

    def look(
        self, number: int, query: Float[Tensor, "1 Hq T Dk"], scores: ScoreOptions, window: int | None
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to what stands in the slots at a layer."""
        if scores.position_bias is not None:
            # The model worked it out from places in the row.
            scores = replace(scores, position_bias=None)
        layer = _Layer(self.cache.keys[number], self.cache.values[number], scores, window, self.relative.get(number))
        count = len(self.singles)
        outputs = []
        if count:
            outputs.append(self._attend_singles(query[0, :, :count].transpose(0, 1), layer))
        first = count
        for span in self.spans:
            outputs.append(self._attend_span(query[:, :, first : first + span.count], span, layer))
            first += span.count
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def _attend_singles(self, query: Float[Tensor, "B Hq Dk"], layer: _Layer) -> Float[Tensor, "B Hq Dv"]:
        """All texts that add a token: together up to a common length, and by themselves those that are longer."""
        if self.common:
            out = self._attend_together(query, layer)
        else:
            out = query.new_empty(*query.shape[:2], layer.values.shape[3])
        for number, span in self.alone:
            out[number] = self._attend_span(query[None, number, :, None], span, layer)[0]
        return out

    def _attend_together(self, query: Float[Tensor, "B Hq Dk"], layer: _Layer) -> Float[Tensor, "B Hq Dv"]:
        keys, values, scores = layer.keys, layer.values, layer.scores
        heads, kv_heads = query.shape[1], keys.shape[1]
        if not self.whole:
            spread = query.new_zeros(self.rows, *query.shape[1:])
            spread[self.slots] = query
            query = spread
        key, value = keys[: self.rows, :, : self.common], values[: self.rows, :, : self.common]
        mask = self._shared_mask(layer, query.dtype)
        if not scores.fused:
            out = eager_attention(query[:, :, None], key, value, mask, scores)[:, :, 0]
        elif query.dtype != torch.float32 and query.device.type == "cpu" and key.numel() <= _SMALL:
            # As one text whose heads are those of all.
            spread_mask = self._spread_mask(mask, layer, heads)
            one = query.reshape(1, -1, 1, query.shape[2]), key.flatten(0, 1)[None], value.flatten(0, 1)[None]
            out = grouped_attention(*one, None, spread_mask, scores.scale).reshape(self.rows, heads, -1)
        else:
            # Query heads that share a KV head stand side by side as rows, so that keys are never repeated.
            grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
            if mask.shape[1] > 1:
                mask = mask.view(self.rows, kv_heads, heads // kv_heads, self.common)
            out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scores.scale)
            out = out.flatten(1, 2)
        return out if self.whole else out[self.slots]

    def _attend_span(
        self, query: Float[Tensor, "1 Hq T Dk"], span: QuerySpan, layer: _Layer
    ) -> Float[Tensor, "T Hq Dv"]:
        """One text by itself, over its own length."""
        buffers = (layer.keys, layer.values)
        key, value = (buffer[span.slot : span.slot + 1, :, : span.stop] for buffer in buffers)
        mask, relative = self._span_masks(span, layer)
        if not layer.scores.fused:
            scores = replace(layer.scores, position_bias=relative)
            return eager_attention(query, key, value, mask[None, None], scores)[0].transpose(0, 1)
        return grouped_attention(query, key, value, mask, relative, layer.scores.scale).transpose(0, 1)

    # Masks are added to scores. They are made once a step, and not once a layer.

    def _shared_mask(self, layer: _Layer, dtype: torch.dtype) -> Float[Tensor, "R M 1 S"]:
        known = self._masks.get(layer.masked_as)
        if known is None:
            device = self.cache.device
            last = torch.zeros(self.rows, 1, dtype=torch.long, device=device)
            prefix = torch.zeros_like(last)
            last[self.slots, 0] = self.places
            prefix[self.slots, 0] = torch.tensor([span.prefix_length for span in self.singles], device=device)
            column = torch.arange(self.common, device=device)
            known = _mask(last, column, layer.window, prefix, dtype)[:, None, None]
            if layer.relative is not None:
                added = _at_distance(layer.relative, last, column, prefix)
                known = known + added.transpose(0, 1)[:, :, None].to(dtype)
            self._masks[layer.masked_as] = known
        return known

    def _spread_mask(self, mask: Float[Tensor, "R M 1 S"], layer: _Layer, heads: int) -> Float[Tensor, "1 N 1 S"]:
        known = self._masks.get((layer.masked_as, heads))
        if known is None:
            known = mask.expand(-1, heads, -1, -1).reshape(1, -1, 1, self.common)
            self._masks[layer.masked_as, heads] = known
        return known

    def _span_masks(
        self, span: QuerySpan, layer: _Layer
    ) -> tuple[Float[Tensor, "T S"], Float[Tensor, "1 Hq T S"] | None]:
        known = self._span_known.get((span, layer.masked_as))
        if known is None:
            place = torch.arange(span.start, span.stop, device=self.cache.device)[:, None]
            column = torch.arange(span.stop, device=self.cache.device)
            relative = None
            if layer.relative is not None:
                relative = _at_distance(layer.relative, place, column, span.prefix_length)[None]
            mask = _mask(place, column, layer.window, span.prefix_length, self.cache.dtype)
            known = self._span_known[span, layer.masked_as] = mask, relative
        return known


@dataclass(eq=False)
class EncoderAttention:
    """One forward pass of an encoder-decoder over the next token of many texts, as its decoder's attention sees it.

    Attributes:
        decoder: The texts' own slots.
        cross: The slots of what they look at; its spans end where a source ends.
        fresh: Sources that the pass brings, side by side: for each how many positions, and where they go: slots, each
            with the length of the prefix in front.
    """

    decoder: SlotAttention
    cross: SlotAttention
    fresh: Sequence[tuple[int, Sequence[tuple[int, int]]]]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to the texts' own positions, or note fresh sources and attend to each text's source."""
        if layer[0] == "decoder":
            return self.decoder.attend(layer, query, key, value, scores)
        first = 0
        for count, places in self.fresh:
            for slot, start in places:
                for buffers, given in ((self.cross.cache.keys, key), (self.cross.cache.values, value)):
                    buffers[layer[1]][slot, :, start : start + count] = given[0, :, first : first + count]
            first += count
        return self.cross.look(layer[1], query, scores, None)


def shared_length(lengths: Sequence[int], rows: int) -> int:
    """How far texts are attended to together, so that all of it is cheapest; longer ones are attended to alone.

    Together, each of the rows costs the common length; alone, a text costs its own, and a call.

    >>> shared_length([90, 100, 110], rows=3)
    110
    >>> shared_length([90, 100, 5000], rows=3)
    100
    """
    alone = sum(lengths) + CALL_OVERHEAD * len(lengths)
    best, least = 0, alone
    for length in sorted(lengths):
        alone -= length + CALL_OVERHEAD
        if rows * length + CALL_OVERHEAD + alone <= least:
            best, least = length, rows * length + CALL_OVERHEAD + alone
    return best


def _mask(
    place: Int[Tensor, "R 1"],
    column: Int[Tensor, " S"],
    window: int | None,
    prefix_length: Int[Tensor, "R 1"] | int,
    dtype: torch.dtype,
) -> Float[Tensor, "R S"]:
    """What stands at a place sees what stands before it; in a window, only what is near, and the prefix."""
    seen = column <= place
    if window is not None:
        seen &= (place - column < window) | (column < prefix_length)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, float("-inf"))


def _at_distance(
    relative: Float[Tensor, "Hq N"],
    place: Int[Tensor, "R 1"],
    column: Int[Tensor, " S"],
    prefix_length: Int[Tensor, "R 1"] | int,
) -> Float[Tensor, "Hq R S"]:
    """What is added to scores, by how far a column is from a place; nothing at the prefix."""
    distance = (place - column).clamp(0, relative.shape[1] - 1)
    return relative[:, distance].masked_fill(column < prefix_length, 0)
