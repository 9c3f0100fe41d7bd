"""Attention of a step: tokens of many texts, in one row, attend to their own keys and values.

Text by text, over views of the pool; on a CPU, texts whose runs are alike and lie side by side in one call. On CUDA,
all texts in one call of FlashAttention, by a table of each text's pages.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.kernels import ScoreOptions, eager_attention, grouped_attention
from prefixtune.engine.kv_cache import KVCache
from prefixtune.prefix.geometry import Site

_CALL_OVERHEAD = 300
"""Cost of a call of attention on a CPU, besides the positions that it reads, in such positions."""


@dataclass(frozen=True)
class Span:
    """Tokens of one text that a step computes.

    Attributes:
        run: The text's positions in the pool; the prefix comes first.
        start: How many positions of it come before these tokens.
        count: How many tokens.
        prefix_length: Length of the text's prefix.
    """

    run: range
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
    last = [-(-span.run.stop // page) - 1 for span in spans]
    return [
        [0, *accumulate(span.count for span in spans)],
        [0, *accumulate(span.stop for span in spans)],
        [span.stop for span in spans],
        [min(span.run.start // page + n, end) for span, end in zip(spans, last, strict=True) for n in range(most)],
    ]


@dataclass(frozen=True, eq=False)
class _Together:
    """Texts with one token each whose runs are alike and lie side by side, perhaps with others between them.

    Attributes:
        first: Where in the pool the first run begins.
        size: Positions from one run to the next.
        count: How many runs, those between them too.
        length: Positions of the longest text.
        rows: The texts' rows in the step.
        at: Which of the runs are theirs.
    """

    first: int
    size: int
    count: int
    length: int
    rows: Int[Tensor, " B"]
    at: Int[Tensor, " B"]

    @classmethod
    def find(cls, spans: Sequence[Span], page: int) -> Iterator[_Together]:
        """All such texts for which one call costs less than one for each."""
        groups: dict[tuple[int, int], list[int]] = {}
        for row, span in enumerate(spans):
            size = -(-len(span.run) // page) * page
            groups.setdefault((size, span.run.start % size), []).append(row)
        for (size, _), rows in groups.items():
            starts = [spans[row].run.start for row in rows]
            first, length = min(starts), max(spans[row].stop for row in rows)
            count = (max(starts) - first) // size + 1
            alone = sum(spans[row].stop + _CALL_OVERHEAD for row in rows)
            if len(rows) > 1 and count * length + _CALL_OVERHEAD <= alone:
                at = torch.tensor([(start - first) // size for start in starts])
                yield cls(first, size, count, length, torch.tensor(rows), at)


@dataclass(eq=False)
class StepAttention:
    """Attention of one step at one site, and of an encoder-decoder's decoder to its sources.

    Attributes:
        kv_cache: The pool of the site.
        spans: The texts, in the order of the row; those with one token come first.
        places: Where in the pool the new keys and values go.
        pages: The `page_numbers` of the spans, for attention in one call; none: text by text.
        bias_by_layer: Per layer, what is added to the scores by distance; the last one holds for all larger distances.
        cross: Attention to the texts' sources: its spans end where a source ends, its places are those of new sources.
    """

    kv_cache: KVCache
    spans: Sequence[Span]
    places: Int[Tensor, " T"]
    pages: Sequence[Int[Tensor, " _"]] = ()
    bias_by_layer: Mapping[int, Float[Tensor, "Hq N"]] = field(default_factory=dict)
    cross: StepAttention | None = None
    _masks: dict[object, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = [span.count for span in self.spans]
        num_single = next((number for number, count in enumerate(counts) if count > 1), len(counts))
        self.together: list[_Together] = []
        if self.kv_cache.keys[0].device.type == "cpu":
            self.together = list(_Together.find(self.spans[:num_single], self.kv_cache.page))

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
        groups = self.together if scores.fused and index not in self.bias_by_layer else []
        for group in groups:
            out[group.rows] = self._attend_together(index, grouped[group.rows], scores, group)
        done, first = {row for group in groups for row in group.rows.tolist()}, 0
        for number, span in enumerate(self.spans):
            rows = slice(first, first + span.count)
            if number not in done:
                found = self._attend_span(index, query[:, :, rows], scores, span)
                out[rows] = found.unflatten(1, (values.shape[1], -1))
            first += span.count
        return out.flatten(1, 2)[None]

    def _attend_together(
        self, index: int, query: Float[Tensor, "B H G D"], scores: ScoreOptions, group: _Together
    ) -> Float[Tensor, "B H G Dv"]:
        """Texts whose runs lie side by side, in one call; what is between them is computed as well, and dropped."""
        name = (group, scores.window)
        if name not in self._masks:
            stops = torch.ones(group.count, 1, dtype=torch.long)
            prefixes = torch.zeros_like(stops)
            for place, row in zip(group.at.tolist(), group.rows.tolist(), strict=True):
                stops[place], prefixes[place] = self.spans[row].stop, self.spans[row].prefix_length
            # Each text sees its own positions; in a window, the nearest ones and its prefix.
            mask = _mask(stops - 1, torch.arange(group.length), scores.window, prefixes, query.dtype)
            self._masks[name] = mask[:, None, None], None
        whole = query.new_zeros(group.count, *query.shape[1:]).index_copy_(0, group.at, query)
        runs = slice(group.first, group.first + group.count * group.size)
        key, value = (
            part[runs].unflatten(0, (group.count, group.size))[:, : group.length].transpose(1, 2)
            for part in (self.kv_cache.keys[index], self.kv_cache.values[index])
        )
        found = F.scaled_dot_product_attention(whole, key, value, self._masks[name][0], scale=scores.scale)
        return found[group.at]

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
        own = slice(span.run.start, span.run.start + span.stop)
        key, value = (
            part[own].transpose(0, 1)[None] for part in (self.kv_cache.keys[index], self.kv_cache.values[index])
        )
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


def _mask(
    positions: Int[Tensor, "T 1"],
    columns: Int[Tensor, " S"],
    window: int | None,
    prefix_length: int | Int[Tensor, "T 1"],
    dtype: torch.dtype,
) -> Float[Tensor, "T S"]:
    """-inf where a position does not see a column: behind it; in a window, too far before it and not in the prefix."""
    visible = columns <= positions
    if window is not None:
        visible &= (positions - columns < window) | (columns < prefix_length)
    return torch.zeros(visible.shape, dtype=dtype, device=columns.device).masked_fill_(~visible, float("-inf"))
