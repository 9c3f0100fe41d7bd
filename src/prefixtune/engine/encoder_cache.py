"""What an encoder-decoder's running texts read: their sources, encoded once and kept in a pool.

The encoder reads a source in one piece. A source's cross-attention keys and values are computed in the text's first
step, in the same pass as all other texts' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import relative_bias
from prefixtune.attention.forward import run_encoder
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import EncoderAttention, Span, StepAttention
from prefixtune.engine.kv_cache import KVCache
from prefixtune.engine.sequence import TokenSequence

__all__ = ["EncoderCache"]


_FIRST_BIAS_LENGTH = 256
"""Distances at first; twice as many as needed later."""


class EncoderCache:
    """Encoded sources of all running texts.

    Args:
        backbone: An encoder-decoder.
        kv_cache: Cross-attention keys and values.
    """

    def __init__(self, backbone: Backbone, kv_cache: KVCache) -> None:
        self.backbone, self.kv_cache = backbone, kv_cache
        # The sources whose keys and values the next step computes.
        self._new_sources: dict[TokenSequence, Float[Tensor, "1 S E"]] = {}
        # What the pass reads if there is no new source.
        self._placeholder: Float[Tensor, "1 1 E"] | None = None
        self._bias_by_layer: dict[int, Float[Tensor, "Hq N"]] = {}
        self._bias_length = 0

    def encode(self, sequence: TokenSequence) -> None:
        """Let the encoder read a text's source."""
        request = sequence.request
        if request.prefix is not None:
            self.kv_cache.put(sequence.runs[1], request.prefix)
        ids = torch.tensor([request.prompt], device=self.backbone.device)
        with self.backbone.autocast():
            source = run_encoder(self.backbone.model, self.backbone.layout, ids, request.prefix)
        if self._placeholder is None:
            self._placeholder = torch.zeros_like(source[:, :1])
        self._new_sources[sequence] = source

    def spans(self, sequences: Sequence[TokenSequence]) -> list[Span]:
        """What each text's next token sees: a prefix and all of its source."""
        return [Span(s.runs[1], _length(s) - 1, 1, 0) for s in sequences]

    def attention(
        self, decoder: StepAttention, cross: StepAttention, sequences: Sequence[TokenSequence]
    ) -> tuple[EncoderAttention, Float[Tensor, "1 S E"]]:
        """How a step's decoder attends, and the new sources, in one row, that the pass reads.

        Args:
            decoder: Attention to the texts' own positions.
            cross: Attention to their sources, by `spans`.
            sequences: The texts of the step, in the order of the row.
        """
        if self._placeholder is None:
            raise RuntimeError("no source was encoded")
        new = {s: self._new_sources.pop(s) for s in sequences if s in self._new_sources}
        targets = [(e.shape[1], s.runs[1].start + _length(s) - e.shape[1]) for s, e in new.items()]
        longest = max(span.stop for span in decoder.spans)
        decoder.bias_by_layer = self._distance_bias(longest)
        row = torch.cat(list(new.values()), dim=1) if new else self._placeholder
        return EncoderAttention(decoder, cross, targets), row

    def share(self, sequence: TokenSequence, encoded: TokenSequence) -> None:
        """Give a text the source of another one of the same request."""
        self.kv_cache.copy(encoded.runs[1], sequence.runs[1], _length(sequence))

    def forget(self, sequence: TokenSequence) -> None:
        """Keep nothing of a text that has ended."""
        self._new_sources.pop(sequence, None)

    def _distance_bias(self, length: int) -> dict[int, Float[Tensor, "Hq N"]]:
        """Per layer, the decoder's bias by distance, for as many distances as there are, and for more later."""
        if length > self._bias_length:
            self._bias_length = max(_FIRST_BIAS_LENGTH, 2 * length)
            self._bias_by_layer = relative_bias(self.backbone.model, self.backbone.layout, self._bias_length)
        return self._bias_by_layer


def _length(sequence: TokenSequence) -> int:
    """Positions of a text's prefix and source in the pool of sources."""
    prefix = sequence.request.prefix
    return len(sequence.request.prompt) + (0 if prefix is None else prefix.length("cross"))
