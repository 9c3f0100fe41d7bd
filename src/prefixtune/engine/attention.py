"""Attention of a step: tokens of many texts, in one row, attend to their own keys and values.

On CUDA, all texts in one call of FlashAttention, by a table of each text's pages. Elsewhere text by text; on a CPU,
short texts in one call, and a long prefix that several texts have in one call for all of them. What a text sees of its
prefix and of the rest is then averaged by the sums of their exponentiated scores (Juravsky et al. 2024).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.kernels import ScoreOptions, eager_attention, grouped_attention
from prefixtune.engine.kv_cache import KVCache, Pages
from prefixtune.prefix.geometry import Site

_LONG = 512
"""Positions from which a text, or a common prefix, is worth a call of its own on a CPU."""


@dataclass(frozen=True)
class Span:
    """Tokens of one text that a step computes.

    Attributes:
        pages: The text's positions in the pool; the prefix comes first.
        start: How many positions come before these tokens.
        count: How many tokens.
        prefix_length: Length of the text's prefix.
    """

    pages: Pages
    start: int
    count: int
    prefix_length: int

    @property
    def stop(self) -> int:
        """The position after the last token."""
        return self.start + self.count


def page_numbers(spans: Sequence[Span], page: int) -> list[list[int]]:
    """The texts of a step as FlashAttention takes them.

    Where each text's tokens begin in the row, and its end; the same of all that they see; how many positions each text
    has; and its pages, for each text as many as the longest one has: what is behind its last page is not read.
    """
    most = max(-(-span.stop // page) for span in spans)
    tables = [list(span.pages.numbers[:most]) for span in spans]
    return [
        [0, *accumulate(span.count for span in spans)],
        [0, *accumulate(span.stop for span in spans)],
        [span.stop for span in spans],
        [number for table in tables for number in table + table[-1:] * (most - len(table))],
    ]


@dataclass(eq=False)
class StepAttention:
    """Attention of one step at one site, and of an encoder-decoder's decoder to its sources.

    Attributes:
        kv_cache: The pool of the site.
        spans: The texts, in the order of the row.
        places: Where in the pool the new keys and values go.
        pages: The `page_numbers` of the spans, for attention in one call; none: text by text.
        bias_by_layer: Per layer, what is added to the scores by distance; the last one holds for all larger distances.
        cross: Attention to the texts' sources: its spans end where a source ends, its places are those of new sources.
        together: Texts with one token each that have few positions, in groups of like lengths.
        heads: Texts that have a long beginning in common.
    """

    kv_cache: KVCache
    spans: Sequence[Span]
    places: Int[Tensor, " T"]
    pages: Sequence[Int[Tensor, " _"]] = ()
    bias_by_layer: Mapping[int, Float[Tensor, "Hq N"]] = field(default_factory=dict)
    cross: StepAttention | None = None
    together: Sequence[Sequence[int]] = field(init=False)
    heads: Sequence[Sequence[int]] = field(init=False)
    _masks: dict[object, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        stops = accumulate(span.count for span in self.spans)
        self._rows = [torch.arange(stop - span.count, stop) for span, stop in zip(self.spans, stops, strict=True)]
        heads: dict[tuple[int, int], list[int]] = {}
        for number, span in enumerate(self.spans):
            heads.setdefault((span.pages.numbers[0], span.pages.head), []).append(number)
        self.heads = [group for (_, head), group in heads.items() if len(group) > 1 and head >= _LONG]
        # Where what they do not have in common begins.
        self._starts = {number: self.spans[number].pages.head for group in self.heads for number in group}
        together: dict[int, list[int]] = {}
        for number, span in enumerate(self.spans):
            length = span.stop - self._starts.get(number, 0)
            if span.count == 1 and length <= _LONG:
                together.setdefault(max(7, (length - 1).bit_length()), []).append(number)
        self.together = [group for group in together.values() if len(group) > 1]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Write keys and values into the pool, and attend to what each text has there."""
        site, index = layer
        if site != self.kv_cache.site:
            assert self.cross is not None
            return self.cross.attend(layer, query, key, value, replace(scores, window=None))
        if len(self.places):
            self.kv_cache.keys[index][self.places] = key[0].transpose(0, 1)
            self.kv_cache.values[index][self.places] = value[0].transpose(0, 1)
        if self._fits_pages(index, query, scores):
            return self._attend_pages(index, query, scores)
        # What the model computed of it came from positions in the row.
        scores = replace(scores, position_bias=None) if scores.position_bias is not None else scores
        values = self.kv_cache.values[index]
        # Query heads that share a KV head are rows of one product, so that keys are never repeated.
        grouped = query[0].transpose(0, 1).unflatten(1, (values.shape[1], -1))
        out = query.new_empty(*grouped.shape[:3], values.shape[2])
        alone = set(range(len(self.spans)))
        if self._takes_parts(index, query, scores):
            alone -= set(chain(*self.together, *self.heads))
            self._attend_parts(index, grouped, scores, out)
        for number in alone:
            rows, span = self._rows[number], self.spans[number]
            found = self._attend_span(index, query[:, :, rows[0] : rows[-1] + 1], scores, span)
            out[rows[0] : rows[-1] + 1] = found.unflatten(1, (values.shape[1], -1))
        return out.flatten(1, 2)[None]

    def _takes_parts(self, index: int, query: Tensor, scores: ScoreOptions) -> bool:
        """Whether a CPU computes several texts in one call; in a window, not where more than a prefix is in common."""
        return (
            query.device.type == "cpu"
            and scores.fused
            and index not in self.bias_by_layer
            and query.shape[3] == self.kv_cache.values[index].shape[2]
            and (scores.window is None or all(self._starts[n] <= self.spans[n].prefix_length for n in self._starts))
        )

    def _attend_parts(
        self, index: int, query: Float[Tensor, "T H G D"], scores: ScoreOptions, out: Float[Tensor, "T H G D"]
    ) -> None:
        """Short texts in one call; and what several have in common in one call, the rest of each in another."""
        sums = query.new_empty(query.shape[:3], dtype=torch.float32)
        apart = set(self._starts) - set(chain(*self.together))
        for group in [*self.together, *([number] for number in apart)]:
            rows, table, mask = self._part(tuple(group), scores.window, query.dtype)
            # `index_select` copies whole pages, which indexing does number by number.
            key, value = (
                buffers[index].unflatten(0, (-1, self.kv_cache.page)).index_select(0, table.flatten()).flatten(0, 1)
                for buffers in (self.kv_cache.keys, self.kv_cache.values)
            )
            key, value = (part.unflatten(0, (len(group), -1)) for part in (key, value))
            found, found_sums = _partial(query[rows].unflatten(0, (len(group), -1)), key, value, mask, scores.scale)
            out[rows], sums[rows] = found.flatten(0, 1), found_sums.flatten(0, 1)
        for group in self.heads:
            rows, pages = torch.cat([self._rows[number] for number in group]), self.spans[group[0]].pages
            key, value = self._read(index, pages, 0, pages.head)
            found, found_sums = _partial(query[rows][None], key[None], value[None], None, scores.scale)
            share = torch.sigmoid(found_sums[0] - sums[rows])[..., None]
            out[rows] = torch.lerp(out[rows].float(), found[0].float(), share).to(out.dtype)

    def _part(
        self, group: Sequence[int], window: int | None, dtype: torch.dtype
    ) -> tuple[Int[Tensor, " _"], Int[Tensor, "B N"], Float[Tensor, "B T S"]]:
        """Rows of texts, their pages behind what they have in common with others, and what they see there."""
        if (group, window) not in self._masks:
            spans, page = [self.spans[number] for number in group], self.kv_cache.page
            starts = [self._starts.get(number, 0) for number in group]
            tables = [
                list(one.pages.numbers[start // page : -(-one.stop // page)])
                for one, start in zip(spans, starts, strict=True)
            ]
            most = max(map(len, tables))
            table = torch.tensor([own + own[-1:] * (most - len(own)) for own in tables])
            first, stops, prefixes = torch.tensor(
                [starts, [span.stop for span in spans], [span.prefix_length for span in spans]]
            )[:, :, None, None]
            positions = stops - torch.arange(spans[0].count, 0, -1)[:, None]
            mask = _mask(positions, first + torch.arange(most * page), window, prefixes, dtype)
            self._masks[group, window] = torch.cat([self._rows[number] for number in group]), table, mask
        found: tuple[Tensor, Tensor, Tensor] = self._masks[group, window]
        return found

    def _read(self, index: int, pages: Pages, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """A layer's keys and values of some of a text's positions, (S, H, D)."""
        parts = [slice(places.start, places.stop) for places in pages.places(start, stop)]
        key, value = (
            buffer[parts[0]] if len(parts) == 1 else torch.cat([buffer[part] for part in parts])
            for buffer in (self.kv_cache.keys[index], self.kv_cache.values[index])
        )
        return key, value

    def _attend_span(
        self, index: int, query: Float[Tensor, "1 Hq T Dk"], scores: ScoreOptions, span: Span
    ) -> Float[Tensor, "T Hq Dv"]:
        """One text by itself, with a mask and a bias that its layers share."""
        by_distance, window = self.bias_by_layer.get(index), scores.window
        name = (span, window, None if by_distance is None else by_distance.data_ptr())
        if name not in self._masks:
            positions = torch.arange(span.start, span.stop, device=query.device)[:, None]
            columns = torch.arange(span.stop, device=query.device)
            mask = bias = None
            if span.count > 1 or (window is not None and span.stop - span.prefix_length > window):
                mask = _mask(positions, columns, window, span.prefix_length, query.dtype)
            if by_distance is not None:
                distances = (positions - columns).clamp(0, by_distance.shape[1] - 1)
                # The prefix has none.
                bias = by_distance[:, distances].masked_fill(columns < span.prefix_length, 0)[None]
            self._masks[name] = mask, bias
        mask, bias = self._masks[name]
        key, value = (part.transpose(0, 1)[None] for part in self._read(index, span.pages, 0, span.stop))
        if not scores.fused:
            wide = None if mask is None else mask[None, None]
            return eager_attention(query, key, value, wide, replace(scores, position_bias=bias))[0].transpose(0, 1)
        return grouped_attention(query, key, value, mask, bias, scores.scale).transpose(0, 1)

    def _fits_pages(self, index: int, query: Tensor, scores: ScoreOptions) -> bool:
        """Whether FlashAttention makes these scores; in a window it would hide the prefix."""
        window = scores.window
        return (
            len(self.pages) > 0
            and scores.fused
            and index not in self.bias_by_layer
            and query.dtype in _PAGED_DTYPES
            and query.shape[3] == self.kv_cache.values[index].shape[2] <= 256
            and (window is None or all(s.stop <= window or not s.prefix_length for s in self.spans))
        )

    def _attend_pages(
        self, index: int, query: Float[Tensor, "1 Hq T D"], scores: ScoreOptions
    ) -> Float[Tensor, "1 T Hq D"]:
        """All texts in one call, without a mask."""
        varlen, by_page = varlen_attention(), (-1, self.kv_cache.page)
        assert varlen is not None
        first_queries, first_keys, lengths, table = self.pages
        out: Tensor = varlen(
            query[0].transpose(0, 1),
            self.kv_cache.keys[index].unflatten(0, by_page),
            self.kv_cache.values[index].unflatten(0, by_page),
            first_queries,
            first_keys,
            max(span.count for span in self.spans),
            max(span.stop for span in self.spans),
            scale=scores.scale,
            window_size=(-1 if scores.window is None else scores.window - 1, 0),
            enable_gqa=True,
            seqused_k=lengths,
            block_table=table.view(len(self.spans), -1),
        )
        return out[None]


_PAGED_DTYPES = (torch.float16, torch.bfloat16)


@functools.cache
def varlen_attention() -> Callable[..., Any] | None:
    """Torch's FlashAttention with a table of pages; None: this torch has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "block_table" in inspect.signature(varlen_attn).parameters else None


def attends_by_pages(device: torch.device) -> bool:
    """Whether all texts are attended to in one call, by a table of their pages, for which a GPU must be an Ampere."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    return varlen_attention() is not None


def _partial(
    query: Float[Tensor, "B T H G D"],
    key: Float[Tensor, "B S H D"],
    value: Float[Tensor, "B S H D"],
    mask: Float[Tensor, "B T S"] | None,
    scale: float,
) -> tuple[Float[Tensor, "B T H G D"], Float[Tensor, "B T H G"]]:
    """Attention to some of the positions that a text sees, and the logarithms of the sums of exponentiated scores."""
    rows = query.permute(0, 2, 1, 3, 4)
    if mask is not None:
        mask = mask[:, None, :, None].expand(-1, 1, -1, query.shape[3], -1).flatten(2, 3)
    # Torch's fused function on a CPU, of which scaled_dot_product_attention keeps the sums to itself.
    found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        rows.flatten(2, 3), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask, scale=scale
    )
    return found.view_as(rows).permute(0, 2, 1, 3, 4), sums.view(rows.shape[:4]).permute(0, 2, 1, 3)


def _mask(
    positions: Int[Tensor, "*_B T 1"],
    columns: Int[Tensor, "*_B S"],
    window: int | None,
    prefix_length: int | Int[Tensor, "*_B 1 1"],
    dtype: torch.dtype,
) -> Float[Tensor, "*_B T S"]:
    """-inf where a position does not see a column: behind it; in a window, too far before it and not in the prefix."""
    visible = columns <= positions
    if window is not None:
        visible &= (positions - columns < window) | (columns < prefix_length)
    return torch.zeros(visible.shape, dtype=dtype, device=columns.device).masked_fill_(~visible, float("-inf"))
