"""What the texts of an encoder-decoder look at: each one's source, read once and kept in the text's slot.

An encoder reads a source in one piece, alone; what the decoder sees of it is worked out in the text's first step, with
all others'. Knows nothing of requests' order and of text.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.compute import relative_bias
from prefixtune.attention.forward import run_encoder
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import EncoderAttention, SlotAttention
from prefixtune.engine.kv_cache import KVCache, Span
from prefixtune.engine.sequence import TokenSequence

__all__ = ["EncoderCache"]


UNBOUNDED = 2**31
"""Positions of a slot: sources are bounded where requests are taken."""


class EncoderCache:
    """Encoded sources of all slots.

    Args:
        backbone: An encoder-decoder.
        num_slots: Texts at once.
    """

    def __init__(self, backbone: Backbone, num_slots: int) -> None:
        self.backbone = backbone
        self.cache = KVCache(
            backbone.geometry["cross"], num_slots, UNBOUNDED, backbone.dtype, backbone.device, site="cross"
        )
        self._lengths: dict[int, int] = {}
        self._fresh: dict[int, Float[Tensor, "1 S E"]] = {}
        self._nothing: Float[Tensor, "1 1 E"] | None = None
        self._relative: dict[int, Float[Tensor, "Hq N"]] = {}
        self._relative_length = 0

    def read(self, sequence: TokenSequence) -> None:
        """Encode a text's source, and make room for it in the text's slot."""
        prefix, prompt = sequence.request.prefix, sequence.request.prompt
        self.cache.reserve(_prefix_length(sequence) + len(prompt))
        if prefix is not None:
            self.cache.put(sequence.slot, prefix)
        with self.backbone.autocast():
            ids = torch.tensor([prompt], device=self.backbone.device)
            encoded = run_encoder(self.backbone.model, self.backbone.layout, ids, prefix)
        if self._nothing is None:
            self._nothing = torch.zeros_like(encoded[:, :1])
        self._fresh[sequence.slot] = encoded
        self._lengths[sequence.slot] = _prefix_length(sequence) + len(prompt)

    def share(self, sequence: TokenSequence, other: TokenSequence) -> None:
        """Give a text what another one of the same request looks at."""
        self._lengths[sequence.slot] = self._lengths[other.slot]
        if other.slot in self._fresh:
            if sequence.request.prefix is not None:
                self.cache.put(sequence.slot, sequence.request.prefix)
            self._fresh[sequence.slot] = self._fresh[other.slot]
        else:
            self.cache.copy(other.slot, sequence.slot, self._lengths[other.slot])

    def begin(
        self, decoder: SlotAttention, sequences: list[TokenSequence]
    ) -> tuple[EncoderAttention, Float[Tensor, "1 S E"]]:
        """A step of some texts: how its decoder attends, and the sources that the pass is to bring.

        Args:
            decoder: The texts' own slots.
            sequences: The texts, as they stand in the row.
        """
        if self._nothing is None:
            raise RuntimeError("no source was read")
        places: dict[int, list[tuple[int, int]]] = {}
        parts: dict[int, Float[Tensor, "1 S E"]] = {}
        for sequence in sequences:
            encoded = self._fresh.pop(sequence.slot, None)
            if encoded is not None:
                parts[id(encoded)] = encoded
                places.setdefault(id(encoded), []).append((sequence.slot, _prefix_length(sequence)))
        spans = [Span(sequence.slot, self._lengths[sequence.slot] - 1, 1, 0) for sequence in sequences]
        fresh = [(parts[name].shape[1], found) for name, found in places.items()]
        decoder.relative = self._relative_of(decoder.cache.capacity, self._nothing)
        row = torch.cat(list(parts.values()), dim=1) if parts else self._nothing
        return EncoderAttention(decoder, SlotAttention(self.cache, spans, ()), fresh), row

    def wipe(self, slot: int) -> None:
        """Leave nothing of a text."""
        self._fresh.pop(slot, None)
        # A failed step may have written a source whose length is known.
        self.cache.wipe(slot, self._lengths.pop(slot, 0))

    def _relative_of(self, capacity: int, encoded: Float[Tensor, "1 1 E"]) -> dict[int, Float[Tensor, "Hq N"]]:
        """What the decoder adds to scores by distance, for as many distances as slots have positions."""
        if capacity > self._relative_length:
            self._relative = relative_bias(self.backbone.model, self.backbone.layout, capacity, encoded)
            self._relative_length = capacity if self._relative else UNBOUNDED
        return self._relative


def _prefix_length(sequence: TokenSequence) -> int:
    prefix = sequence.request.prefix
    return 0 if prefix is None else prefix.length("cross")
