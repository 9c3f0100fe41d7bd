"""What an encoder-decoder's running sequences read: their sources, encoded once and kept in the sequence's slot.

The encoder reads a source in one piece. Its cross-attention keys and values are computed in the sequence's first step,
in the same pass as all other sequences' tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import relative_bias
from prefixtune.attention.forward import run_encoder
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import EncoderAttention, NewSource, SlotAttention
from prefixtune.engine.kv_cache import UNBOUNDED, KVCache
from prefixtune.engine.sequence import TokenSequence
from prefixtune.engine.shared_prefix import SharedPrefix
from prefixtune.engine.span import QuerySpan

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
        # By slot: how many positions of it are used, by the prefix and the source, or by the source alone; the prefixes
        # outside the slots; and the sources whose keys and values the next step computes.
        self._lengths: dict[int, int] = {}
        self._prefixes: dict[int, SharedPrefix] = {}
        self._new_sources: dict[int, Float[Tensor, "1 S E"]] = {}
        # What the pass reads if there is no new source.
        self._placeholder: Float[Tensor, "1 1 E"] | None = None
        self._bias_by_layer: dict[int, Float[Tensor, "Hq N"]] = {}
        self._bias_length = 0

    def encode(self, sequences: Sequence[TokenSequence], *, share_prefixes: bool = False) -> None:
        """Encode the sequences' sources, and make room for them in the sequences' slots.

        Args:
            sequences: The sequences.
            share_prefixes: Read long prefixes where they are, instead of copying them into the slots.
        """
        lengths = [self._load_prefix(sequence, share_prefixes) for sequence in sequences]
        with self.backbone.autocast():
            encoded = [self._run_encoder(sequence) for sequence in sequences]
        for sequence, source, length in zip(sequences, encoded, lengths, strict=True):
            if self._placeholder is None:
                self._placeholder = torch.zeros_like(source[:, :1])
            self._new_sources[sequence.slot] = source
            self._lengths[sequence.slot] = length

    def _load_prefix(self, sequence: TokenSequence, share: bool) -> int:
        """Make a sequence's prefix readable, and room for its source; returns how many positions its slot needs."""
        prefix, length = sequence.request.prefix, len(sequence.request.prompt)
        shared = self.kv_cache.prefixes.get(prefix) if prefix is not None and share else None
        if shared is not None:
            self._prefixes[sequence.slot] = shared
        elif prefix is not None:
            length += prefix.length("cross")
            self.kv_cache.put(sequence.slot, prefix)
        self.kv_cache.reserve(length)
        return length

    def _run_encoder(self, sequence: TokenSequence) -> Float[Tensor, "1 S E"]:
        source = torch.tensor([sequence.request.prompt], device=self.backbone.device)
        return run_encoder(self.backbone.model, self.backbone.layout, source, sequence.request.prefix)

    def share(self, sequence: TokenSequence, encoded: TokenSequence) -> None:
        """Give a sequence the source of another sequence of the same request."""
        length = self._lengths[sequence.slot] = self._lengths[encoded.slot]
        if encoded.slot in self._prefixes:
            self._prefixes[sequence.slot] = self._prefixes[encoded.slot]
        if encoded.slot in self._new_sources:
            # Of the slot, there is a copied prefix at most.
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
        spans = [self._span(sequence.slot) for sequence in sequences]
        new_sources = [NewSource(source.shape[1], targets[key]) for key, source in sources.items()]
        decoder.bias_by_layer = self._distance_bias(decoder.kv_cache.capacity, self._placeholder)
        cross = SlotAttention(self.kv_cache, spans, (), kernel=decoder.kernel)
        row = torch.cat(list(sources.values()), dim=1) if sources else self._placeholder
        return EncoderAttention(decoder, cross, new_sources), row

    def computed(self, sequences: Sequence[TokenSequence]) -> None:
        """Note that a step has computed what is new of the sequences' sources; one that fails may be tried again."""
        for sequence in sequences:
            self._new_sources.pop(sequence.slot, None)

    def _span(self, slot: int) -> QuerySpan:
        """A query that sees a slot's prefix and all of its source."""
        prefix = self._prefixes.get(slot)
        prefix_length = 0 if prefix is None else prefix.length
        return QuerySpan(slot, prefix_length + self._lengths[slot] - 1, 1, prefix_length, prefix)

    def wipe(self, slot: int) -> None:
        """Leave nothing of a sequence in its slot."""
        self._new_sources.pop(slot, None)
        self._prefixes.pop(slot, None)
        # A failed step may have written a source whose length is known.
        self.kv_cache.wipe(slot, self._lengths.pop(slot, 0))

    def _distance_bias(self, capacity: int, encoded: Float[Tensor, "1 1 E"]) -> dict[int, Float[Tensor, "Hq N"]]:
        """Per layer, the decoder's bias by distance, for as many distances as slots have positions."""
        if capacity > self._bias_length:
            self._bias_by_layer = relative_bias(self.backbone.model, self.backbone.layout, capacity, encoded)
            self._bias_length = capacity if self._bias_by_layer else UNBOUNDED
        return self._bias_by_layer
