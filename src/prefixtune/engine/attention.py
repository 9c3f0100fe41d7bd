"""Attention of a step: tokens of many texts, in one row, attend to their own keys and values.

On a CPU, and for scores that fused kernels do not make, text by text, over views of the pool. On CUDA, all texts in one
call of FlashAttention, by a table of each text's pages.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.attention.kernels import ScoreOptions, eager_attention, grouped_attention
from prefixtune.engine.kv_cache import CUDA_PAGE, KVCache
from prefixtune.prefix.geometry import Site

__all__ = ["EncoderAttention", "Span", "StepAttention", "page_numbers", "page_size"]


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
    last = [span.run.stop // page - 1 for span in spans]
    return [
        [0, *accumulate(span.count for span in spans)],
        [0, *accumulate(span.stop for span in spans)],
        [span.stop for span in spans],
        [min(span.run.start // page + n, end) for span, end in zip(spans, last, strict=True) for n in range(most)],
    ]


@dataclass(eq=False)
class StepAttention:
    """Attention of one step.

    Attributes:
        kv_cache: The pool.
        spans: The texts, in the order of the row; those with one token come first.
        places: Where in the pool each token of the row goes; None: nothing is written.
        pages: The `page_numbers` of the spans, for attention in one call; none: text by text.
        bias_by_layer: Per layer, what is added to the scores by distance; the last one holds for all larger distances.
    """

    kv_cache: KVCache
    spans: Sequence[Span]
    places: Int[Tensor, " T"] | None
    pages: Sequence[Int[Tensor, " _"]] = ()
    bias_by_layer: Mapping[int, Float[Tensor, "Hq N"]] = field(default_factory=dict)
    _masks: dict[object, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        counts = [span.count for span in self.spans]
        self.num_single = next((number for number, count in enumerate(counts) if count > 1), len(counts))

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H T Dk"],
        value: Float[Tensor, "1 H T Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Write the tokens' keys and values into the pool, and attend to what each text has there."""
        self.kv_cache.keys[layer[1]][self.places] = key[0].transpose(0, 1)
        self.kv_cache.values[layer[1]][self.places] = value[0].transpose(0, 1)
        return self.read(layer[1], query, scores, scores.window)

    def read(
        self, index: int, query: Float[Tensor, "1 Hq T Dk"], scores: ScoreOptions, window: int | None
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to the texts at a layer, as they are in the pool."""
        keys, values, bias = self.kv_cache.keys[index], self.kv_cache.values[index], self.bias_by_layer.get(index)
        if self._fits_pages(query, values, scores, window, bias):
            return self._attend_pages(query, keys, values, scores, window)
        # What the model computed of it came from positions in the row.
        scores = replace(scores, position_bias=None) if scores.position_bias is not None else scores
        heads, kv_heads = query.shape[1], keys.shape[1]
        key, value = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        # Query heads that share a KV head are rows of one product, so that keys are never repeated.
        singles = query[0, :, : self.num_single].transpose(0, 1).unflatten(1, (kv_heads, heads // kv_heads))[:, None]
        one_by_one = singles.unbind()
        plain = scores.fused and bias is None and not (query.dtype != torch.float32 and query.device.type == "cpu")
        outputs, first = [], 0
        for number, span in enumerate(self.spans):
            key_view = key.narrow(2, span.run.start, span.stop)
            value_view = value.narrow(2, span.run.start, span.stop)
            if plain and number < self.num_single and (window is None or span.stop - span.prefix_length <= window):
                out = F.scaled_dot_product_attention(one_by_one[number], key_view, value_view, scale=scores.scale)
                outputs.append(out)
            else:
                rows = query[:, :, first : first + span.count]
                out = self._attend_span(rows, key_view, value_view, span, scores, window, bias)
                outputs.append(out.unflatten(1, (kv_heads, -1)))
            first += span.count
        return torch.cat(outputs).flatten(1, 2)[None]

    def _attend_span(
        self,
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        span: Span,
        scores: ScoreOptions,
        window: int | None,
        distance_bias: Float[Tensor, "Hq N"] | None,
    ) -> Float[Tensor, "T Hq Dv"]:
        """One text by itself, with a mask and a bias that its layers share."""
        name = (span, window, None if distance_bias is None else distance_bias.data_ptr())
        if name not in self._masks:
            self._masks[name] = _mask_and_bias(span, window, distance_bias, query.dtype, query.device)
        mask, bias = self._masks[name]
        if not scores.fused:
            wide = None if mask is None else mask[None, None]
            return eager_attention(query, key, value, wide, replace(scores, position_bias=bias))[0].transpose(0, 1)
        return grouped_attention(query, key, value, mask, bias, scores.scale).transpose(0, 1)

    def _fits_pages(
        self, query: Tensor, values: Tensor, scores: ScoreOptions, window: int | None, bias: Tensor | None
    ) -> bool:
        """Whether FlashAttention makes these scores; in a window it would hide the prefix."""
        return (
            len(self.pages) > 0
            and scores.fused
            and bias is None
            and query.dtype in _PAGED_DTYPES
            and query.shape[3] == values.shape[2] <= 256
            and (window is None or all(s.stop <= window or not s.prefix_length for s in self.spans))
        )

    def _attend_pages(
        self,
        query: Float[Tensor, "1 Hq T D"],
        keys: Float[Tensor, "N H D"],
        values: Float[Tensor, "N H D"],
        scores: ScoreOptions,
        window: int | None,
    ) -> Float[Tensor, "1 T Hq D"]:
        """All texts in one call, without a mask."""
        varlen, by_page = varlen_attention(), (-1, self.kv_cache.page)
        assert varlen is not None
        first_queries, first_keys, lengths, table = self.pages
        out: Tensor = varlen(
            query[0].transpose(0, 1),
            keys.unflatten(0, by_page),
            values.unflatten(0, by_page),
            first_queries,
            first_keys,
            max(span.count for span in self.spans),
            max(span.stop for span in self.spans),
            scale=scores.scale,
            window_size=(-1 if window is None else window - 1, 0),
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


def page_size(device: torch.device) -> int:
    """Positions of a page where texts are attended to in one call; 1: they are not."""
    return CUDA_PAGE if device.type == "cuda" and varlen_attention() is not None else 1


def _mask_and_bias(
    span: Span,
    window: int | None,
    distance_bias: Float[Tensor, "Hq N"] | None,
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Float[Tensor, "T S"] | None, Float[Tensor, "1 Hq T S"] | None]:
    """What is added to a text's scores: -inf where a position is not visible, and a bias by distance.

    A position sees itself and what is before it; in a window, only the nearest positions and the prefix. The prefix
    has no bias.
    """
    positions = torch.arange(span.start, span.stop, device=device)[:, None]
    columns = torch.arange(span.stop, device=device)
    mask = bias = None
    if span.count > 1 or (window is not None and span.stop - span.prefix_length > window):
        visible = columns <= positions
        if window is not None:
            visible &= (positions - columns < window) | (columns < span.prefix_length)
        mask = torch.zeros(visible.shape, dtype=dtype, device=device).masked_fill_(~visible, float("-inf"))
    if distance_bias is not None:
        distances = (positions - columns).clamp(0, distance_bias.shape[1] - 1)
        bias = distance_bias[:, distances].masked_fill(columns < span.prefix_length, 0)[None]
    return mask, bias


@dataclass(eq=False)
class EncoderAttention:
    """Attention of one step of an encoder-decoder's decoder.

    Attributes:
        decoder: Attention to the texts' own positions.
        cross: Attention to their sources; its spans end where a source ends.
        new_sources: Of the row, in order: how many positions each has, and where they go in the pool.
    """

    decoder: StepAttention
    cross: StepAttention
    new_sources: Sequence[tuple[int, int]]

    def attend(
        self,
        layer: tuple[Site, int],
        query: Float[Tensor, "1 Hq T Dk"],
        key: Float[Tensor, "1 H S Dk"],
        value: Float[Tensor, "1 H S Dv"],
        scores: ScoreOptions,
    ) -> Float[Tensor, "1 T Hq Dv"]:
        """Attend to the texts' own positions; or store new sources, and attend to each text's source."""
        site, index = layer
        if site == "decoder":
            return self.decoder.attend(layer, query, key, value, scores)
        keys, values = self.cross.kv_cache.keys[index], self.cross.kv_cache.values[index]
        first = 0
        for length, target in self.new_sources:
            keys[target : target + length] = key[0, :, first : first + length].transpose(0, 1)
            values[target : target + length] = value[0, :, first : first + length].transpose(0, 1)
            first += length
        return self.cross.read(index, query, scores, None)
