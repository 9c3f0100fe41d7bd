"""Attention of a step: tokens of many sequences, in one row, attend to their slots of the KV cache."""

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

__all__ = ["EncoderAttention", "NewSource", "QuerySpan", "SlotAttention", "batch_attention", "slot_mask"]

_SMALL = 2**20
"""With at most so many numbers in the keys, plain matrix products beat the CPU's fused bf16 kernel (1.4 times at 138
positions of 32 texts with 3 KV heads of 64)."""
CALL_OVERHEAD = 300
"""Cost of attending to one sequence by itself, besides its length, in positions of a shared call."""


@dataclass(frozen=True)
class QuerySpan:
    """Tokens of one sequence that a step computes.

    Attributes:
        slot: The sequence's slot.
        start: Position of the first of them; the prefix starts at 0.
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
    # A failed growth leaves buffers of different capacities.
    values: Float[Tensor, "S H _C Dv"]
    scores: ScoreOptions
    window: int | None
    distance_bias: Float[Tensor, "Hq N"] | None

    @property
    def mask_key(self) -> tuple[int | None, int | None]:
        """Layers with the same key have the same masks."""
        return self.window, None if self.distance_bias is None else self.distance_bias.data_ptr()


@dataclass(eq=False)
class SlotAttention:
    """Attention of one step: its tokens, in one row, attend to their sequences' slots.

    Decodes attend together up to a common length; those that are far longer, and prefills, one by one.

    Attributes:
        kv_cache: The slots.
        decodes: Sequences with one token in the step, by slot; their tokens come first in the row.
        prefills: Sequences with several tokens, after them.
        bias_by_layer: Per layer, what is added to the scores by distance; the last one holds for all larger distances.
    """

    kv_cache: KVCache
    decodes: Sequence[QuerySpan]
    prefills: Sequence[QuerySpan]
    bias_by_layer: Mapping[int, Float[Tensor, "Hq N"]] = field(default_factory=dict)
    _batch_masks: dict[object, Tensor] = field(default_factory=dict, repr=False)
    _span_masks: dict[object, tuple[Tensor, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        device = self.kv_cache.device
        self.slots: Int[Tensor, " B"] = torch.tensor([span.slot for span in self.decodes], device=device)
        starts = [span.start for span in self.decodes]
        self.columns: Int[Tensor, " B"] = torch.tensor(starts, dtype=torch.long, device=device)
        # Unused slots between used ones are computed as well, and dropped.
        self.num_rows = max((span.slot for span in self.decodes), default=-1) + 1
        self.contiguous = self.num_rows == len(self.decodes)
        self.common_length = shared_length([span.stop for span in self.decodes], self.num_rows)
        self.alone = [(row, span) for row, span in enumerate(self.decodes) if span.stop > self.common_length]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H T Dk"],
        value: Float[Tensor, "1 H T Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Write the tokens' keys and values into the slots, and attend to the slots."""
        keys, values = self.kv_cache.keys[layer[1]], self.kv_cache.values[layer[1]]
        count = len(self.decodes)
        if count:
            keys[self.slots, :, self.columns] = key[0, :, :count].transpose(0, 1)
            values[self.slots, :, self.columns] = value[0, :, :count].transpose(0, 1)
        first = count
        for span in self.prefills:
            row = slice(first, first + span.count)
            keys[span.slot, :, span.start : span.stop] = key[0, :, row]
            values[span.slot, :, span.start : span.stop] = value[0, :, row]
            first += span.count
        return self.read(layer[1], query, scores, scores.window)

    def read(
        self, index: int, query: Float[Tensor, "1 Hq T Dk"], scores: ScoreOptions, window: int | None
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to the slots at a layer, as they are."""
        if scores.position_bias is not None:
            # The model computed it from positions in the row.
            scores = replace(scores, position_bias=None)
        keys, values, bias = self.kv_cache.keys[index], self.kv_cache.values[index], self.bias_by_layer.get(index)
        layer = _Layer(keys, values, scores, window, bias)
        count = len(self.decodes)
        outputs = []
        if count:
            outputs.append(self._attend_decodes(query[0, :, :count].transpose(0, 1), layer))
        first = count
        for span in self.prefills:
            outputs.append(self._attend_span(query[:, :, first : first + span.count], span, layer))
            first += span.count
        return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]

    def _attend_decodes(self, query: Float[Tensor, "B Hq Dk"], layer: _Layer) -> Float[Tensor, "B Hq Dv"]:
        """Decodes: together up to the common length, the others one by one."""
        if self.common_length:
            out = self._attend_batch(query, layer)
        else:
            out = query.new_empty(*query.shape[:2], layer.values.shape[3])
        for row, span in self.alone:
            out[row] = self._attend_span(query[None, row, :, None], span, layer)[0]
        return out

    def _attend_batch(self, query: Float[Tensor, "B Hq Dk"], layer: _Layer) -> Float[Tensor, "B Hq Dv"]:
        keys, values, scores = layer.keys, layer.values, layer.scores
        heads = query.shape[1]
        if not self.contiguous:
            query_by_slot = query.new_zeros(self.num_rows, *query.shape[1:])
            query_by_slot[self.slots] = query
            query = query_by_slot
        key, value = keys[: self.num_rows, :, : self.common_length], values[: self.num_rows, :, : self.common_length]
        mask = self._batch_mask(layer, query.dtype)
        small = query.dtype != torch.float32 and query.device.type == "cpu" and key.numel() <= _SMALL
        if scores.fused and small:
            # As one sequence with the heads of all.
            flat_mask = self._flat_mask(mask, layer, heads)
            flat = query.reshape(1, -1, 1, query.shape[2]), key.flatten(0, 1)[None], value.flatten(0, 1)[None]
            out = grouped_attention(*flat, None, flat_mask, scores.scale).reshape(self.num_rows, heads, -1)
        else:
            out = batch_attention(query, key, value, mask, scores)
        return out if self.contiguous else out[self.slots]

    def _attend_span(
        self, query: Float[Tensor, "1 Hq T Dk"], span: QuerySpan, layer: _Layer
    ) -> Float[Tensor, "T Hq Dv"]:
        """One sequence by itself, over its own length."""
        key, value = (buffer[span.slot : span.slot + 1, :, : span.stop] for buffer in (layer.keys, layer.values))
        mask, bias = self._span_mask(span, layer)
        if not layer.scores.fused:
            scores = replace(layer.scores, position_bias=bias)
            return eager_attention(query, key, value, mask[None, None], scores)[0].transpose(0, 1)
        return grouped_attention(query, key, value, mask, bias, layer.scores.scale).transpose(0, 1)

    # Masks are added to scores. They are computed once a step, and reused by all layers with the same ones.

    def _batch_mask(self, layer: _Layer, dtype: torch.dtype) -> Float[Tensor, "R M 1 S"]:
        mask = self._batch_masks.get(layer.mask_key)
        if mask is None:
            device = self.kv_cache.device
            positions = torch.zeros(self.num_rows, 1, dtype=torch.long, device=device)
            prefix_lengths = torch.zeros_like(positions)
            # Of those that are attended to alone, any will do.
            positions[self.slots, 0] = self.columns
            prefix_lengths[self.slots, 0] = torch.tensor([span.prefix_length for span in self.decodes], device=device)
            columns = torch.arange(self.common_length, device=device)
            mask = slot_mask(positions, columns, layer.window, prefix_lengths, dtype)[:, None, None]
            if layer.distance_bias is not None:
                bias = _bias_at(layer.distance_bias, positions, columns, prefix_lengths)
                mask = mask + bias.transpose(0, 1)[:, :, None].to(dtype)
            self._batch_masks[layer.mask_key] = mask
        return mask

    def _flat_mask(self, mask: Float[Tensor, "R M 1 S"], layer: _Layer, heads: int) -> Float[Tensor, "1 N 1 S"]:
        """The batch's mask for each head of each row."""
        flat = self._batch_masks.get((layer.mask_key, heads))
        if flat is None:
            flat = mask.expand(-1, heads, -1, -1).reshape(1, -1, 1, self.common_length)
            self._batch_masks[layer.mask_key, heads] = flat
        return flat

    def _span_mask(
        self, span: QuerySpan, layer: _Layer
    ) -> tuple[Float[Tensor, "T S"], Float[Tensor, "1 Hq T S"] | None]:
        """The mask and the bias of one sequence."""
        masks = self._span_masks.get((span, layer.mask_key))
        if masks is None:
            positions = torch.arange(span.start, span.stop, device=self.kv_cache.device)[:, None]
            columns = torch.arange(span.stop, device=self.kv_cache.device)
            bias = None
            if layer.distance_bias is not None:
                bias = _bias_at(layer.distance_bias, positions, columns, span.prefix_length)[None]
            mask = slot_mask(positions, columns, layer.window, span.prefix_length, self.kv_cache.dtype)
            masks = self._span_masks[span, layer.mask_key] = mask, bias
        return masks


@dataclass(frozen=True)
class NewSource:
    """An encoded source whose cross-attention keys and values a step computes.

    Attributes:
        length: Its positions in the row of sources.
        targets: Where they go: slots, each with the first position.
    """

    length: int
    targets: Sequence[tuple[int, int]]


@dataclass(eq=False)
class EncoderAttention:
    """Attention of one step of an encoder-decoder's decoder.

    Attributes:
        decoder: Attention to the sequences' own slots.
        cross: Attention to the slots of their sources; its spans end where a source ends.
        new_sources: The sources of the row, in order.
    """

    decoder: SlotAttention
    cross: SlotAttention
    new_sources: Sequence[NewSource]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to the sequences' own positions; or store new sources, and attend to each sequence's source."""
        site, index = layer
        if site == "decoder":
            return self.decoder.attend(layer, query, key, value, scores)
        keys, values = self.cross.kv_cache.keys[index], self.cross.kv_cache.values[index]
        first = 0
        for source in self.new_sources:
            row = slice(first, first + source.length)
            for slot, start in source.targets:
                keys[slot, :, start : start + source.length] = key[0, :, row]
                values[slot, :, start : start + source.length] = value[0, :, row]
            first += source.length
        return self.cross.read(index, query, scores, None)


def batch_attention(
    query: Float[Tensor, "R Hq Dk"],
    key: Float[Tensor, "R H S Dk"],
    value: Float[Tensor, "R H S Dv"],
    mask: Float[Tensor, "R M 1 S"],
    scores: ScoreOptions,
) -> Float[Tensor, "R Hq Dv"]:
    """Attention of one token of each text, with a mask to add to scores, for all heads (M = 1) or for each."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if not scores.fused:
        return eager_attention(query[:, :, None], key, value, mask, replace(scores, position_bias=None))[:, :, 0]
    # Query heads that share a KV head become rows of one head: keys are never repeated.
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads))
    if mask.shape[1] > 1:
        mask = mask.view(len(query), kv_heads, heads // kv_heads, key.shape[2])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scores.scale)
    return out.flatten(1, 2)


def shared_length(lengths: Sequence[int], rows: int) -> int:
    """The cheapest common length: sequences up to it are attended to together, longer ones one by one.

    Together, each row costs the common length; alone, a sequence costs its own length and a call.

    >>> shared_length([90, 100, 110], rows=3)
    110
    >>> shared_length([90, 100, 5000], rows=3)
    100
    """
    alone = sum(lengths) + CALL_OVERHEAD * len(lengths)
    best, lowest_cost = 0, alone
    for length in sorted(lengths):
        alone -= length + CALL_OVERHEAD
        cost = rows * length + CALL_OVERHEAD + alone
        if cost <= lowest_cost:
            best, lowest_cost = length, cost
    return best


def slot_mask(
    positions: Int[Tensor, "R 1"],
    columns: Int[Tensor, " S"],
    window: int | None,
    prefix_length: Int[Tensor, "R 1"] | int,
    dtype: torch.dtype,
) -> Float[Tensor, "R S"]:
    """Each position sees itself and what is before it; in a window, only the nearest positions and the prefix."""
    visible = columns <= positions
    if window is not None:
        visible &= (positions - columns < window) | (columns < prefix_length)
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, float("-inf"))


def _bias_at(
    distance_bias: Float[Tensor, "Hq N"],
    positions: Int[Tensor, "R 1"],
    columns: Int[Tensor, " S"],
    prefix_length: Int[Tensor, "R 1"] | int,
) -> Float[Tensor, "Hq R S"]:
    """What is added to scores, by the distance of a column from a position; nothing at the prefix."""
    distances = (positions - columns).clamp(0, distance_bias.shape[1] - 1)
    return distance_bias[:, distances].masked_fill(columns < prefix_length, 0)
