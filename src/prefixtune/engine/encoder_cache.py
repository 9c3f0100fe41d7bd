"""What an encoder-decoder's running sequences read: their sources, encoded once and kept in the sequence's slot.

The encoder reads a source in one piece. A source's cross-attention keys and values are computed in the sequence's first
step, in the same pass as all other sequences' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import relative_bias
from prefixtune.attention.forward import run_encoder
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import EncoderAttention, NewSource, QuerySpan, SlotAttention
from prefixtune.engine.kv_cache import UNBOUNDED, KVCache
from prefixtune.engine.sequence import TokenSequence

__all__ = ["EncoderCache"]


class EncoderCache:
    """Encoded sources of all slots.

    Args:
        backbone: An encoder-decoder.
        num_slots: Sequences at once.

    Attributes:
        kv_cache: Cross-attention keys and values.
    """

    def __init__(self, backbone: Backbone, num_slots: int) -> None:
        self.backbone = backbone
        self.kv_cache = KVCache(
            backbone.geometry["cross"], num_slots, UNBOUNDED, backbone.dtype, backbone.device, site="cross"
        )
        # By slot: how many positions of it the prefix and the source take; and the sources whose keys and values
        # the next step computes.
        self._lengths: dict[int, int] = {}
        self._new_sources: dict[int, Float[Tensor, "1 S E"]] = {}
        # What the pass reads if there is no new source.
        self._placeholder: Float[Tensor, "1 1 E"] | None = None
        self._bias_by_layer: dict[int, Float[Tensor, "Hq N"]] = {}
        self._bias_length = 0

    def encode(self, sequence: TokenSequence) -> None:
        """Encode a sequence's source, and make room for it in the sequence's slot."""
        prompt, prefix = sequence.request.prompt, sequence.request.prefix
        length = len(prompt)
        if prefix is not None:
            length += prefix.length("cross")
            self.kv_cache.put(sequence.slot, prefix)
        self.kv_cache.reserve(length)
        ids = torch.tensor([prompt], device=self.backbone.device)
        with self.backbone.autocast():
            source = run_encoder(self.backbone.model, self.backbone.layout, ids, prefix)
        if self._placeholder is None:
            self._placeholder = torch.zeros_like(source[:, :1])
        self._new_sources[sequence.slot] = source
        self._lengths[sequence.slot] = length

    def share(self, sequence: TokenSequence, encoded: TokenSequence) -> None:
        """Give a sequence the source of another sequence of the same request."""
        length = self._lengths[sequence.slot] = self._lengths[encoded.slot]
        if encoded.slot in self._new_sources:
            # Of the slot, there is the prefix at most.
            source = self._new_sources[sequence.slot] = self._new_sources[encoded.slot]
            length -= source.shape[1]
        self.kv_cache.copy(encoded.slot, sequence.slot, length)

    def attention(
        self, decoder: SlotAttention, sequences: list[TokenSequence]
    ) -> tuple[EncoderAttention, Float[Tensor, "1 S E"]]:
        """How a step's decoder attends, and the new sources, in one row, that the pass reads.

        Args:
            decoder: Attention over the sequences' own slots.
            sequences: The sequences of the step, in the order of the row.
        """
        if self._placeholder is None:
            raise RuntimeError("no source was encoded")
        # Sequences of one request share a source.
        sources: dict[int, Float[Tensor, "1 S E"]] = {}
        targets: dict[int, list[tuple[int, int]]] = {}
        for sequence in sequences:
            encoded = self._new_sources.get(sequence.slot)
            if encoded is not None:
                sources[id(encoded)] = encoded
                targets.setdefault(id(encoded), []).append(
                    (sequence.slot, self._lengths[sequence.slot] - encoded.shape[1])
                )
        # A query sees a slot's prefix and all of its source.
        spans = [QuerySpan(s.slot, self._lengths[s.slot] - 1, 1, 0) for s in sequences]
        new_sources = [NewSource(source.shape[1], targets[key]) for key, source in sources.items()]
        decoder.bias_by_layer = self._distance_bias(decoder.kv_cache.capacity)
        cross = SlotAttention(self.kv_cache, spans, ())
        row = torch.cat(list(sources.values()), dim=1) if sources else self._placeholder
        return EncoderAttention(decoder, cross, new_sources), row

    def computed(self, sequences: Sequence[TokenSequence]) -> None:
        """Note that a step has computed what is new of the sequences' sources; one that fails may be tried again."""
        for sequence in sequences:
            self._new_sources.pop(sequence.slot, None)

    def wipe(self, slot: int) -> None:
        """Leave nothing of a sequence in its slot."""
        self._new_sources.pop(slot, None)
        # A failed step may have written a source whose length is known.
        self.kv_cache.wipe(slot, self._lengths.pop(slot, 0))

    def _distance_bias(self, capacity: int) -> dict[int, Float[Tensor, "Hq N"]]:
        """Per layer, the decoder's bias by distance, for as many distances as slots have positions."""
        if capacity > self._bias_length:
            self._bias_by_layer = relative_bias(self.backbone.model, self.backbone.layout, capacity)
            self._bias_length = capacity if self._bias_by_layer else UNBOUNDED
        return self._bias_by_layer
