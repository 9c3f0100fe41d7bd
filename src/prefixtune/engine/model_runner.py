"""Runs the model for sequences in slots: their prefixes, their prompts, and the forward pass of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.injection import AttentionBackend
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import QuerySpan, SlotAttention
from prefixtune.engine.encoder_cache import EncoderCache
from prefixtune.engine.kv_cache import UNBOUNDED, KVCache
from prefixtune.engine.scheduler import ScheduledSequence
from prefixtune.engine.sequence import TokenSequence

__all__ = ["ModelRunner"]


class ModelRunner:
    """A frozen model and the keys and values of all slots.

    Args:
        backbone: The model, decoder-only or encoder-decoder.
        num_slots: Sequences that run at once.
        max_length: Most positions of a slot. An encoder-decoder's slots are not limited here: the engine limits source
            and output, where prefixes do not count.

    Attributes:
        kv_cache: Keys and values of prefixes, prompts and texts (of an encoder-decoder's decoder).
        encoder_cache: What an encoder-decoder's decoder sees of sources; None: a decoder-only model.
    """

    def __init__(self, backbone: Backbone, num_slots: int, max_length: int) -> None:
        self.backbone = backbone
        has_encoder = backbone.kind == "encoder-decoder"
        length = UNBOUNDED if has_encoder else max_length
        self.kv_cache = KVCache(backbone.geometry["decoder"], num_slots, length, backbone.dtype, backbone.device)
        self.encoder_cache = EncoderCache(backbone, num_slots) if has_encoder else None

    def load_prefix(self, sequence: TokenSequence) -> None:
        """Copy a sequence's prefix into its slot."""
        if sequence.request.prefix is not None:
            self.kv_cache.put(sequence.slot, sequence.request.prefix)

    def encode(self, sequence: TokenSequence) -> None:
        """Let the encoder read a sequence's source."""
        if self.encoder_cache is None:
            raise RuntimeError("a decoder-only model has no encoder")
        self.encoder_cache.encode(sequence)
        sequence.num_unencoded = 0

    def share_prompt(self, sequence: TokenSequence, computed: TokenSequence) -> None:
        """Copy what was computed of the prompt for another sequence of the same request."""
        if self.encoder_cache is not None:
            self.encoder_cache.share(sequence, computed)
            sequence.num_unencoded = 0
            return
        # Without the prompt's last token: each sequence samples its own next token after it.
        sequence.num_computed_tokens = sequence.num_input_ids - 1
        sequence.prompt_tokens = computed.prompt_tokens
        length = sequence.request.prefix_length + sequence.num_computed_tokens
        self.kv_cache.copy(computed.slot, sequence.slot, length)

    def reserve(self, scheduled: ScheduledSequence) -> None:
        """Let the slots grow if the scheduled tokens need it."""
        sequence = scheduled.sequence
        self.kv_cache.reserve(sequence.request.prefix_length + sequence.num_computed_tokens + scheduled.num_tokens)

    def forward(
        self, decodes: Sequence[ScheduledSequence], prefills: Sequence[ScheduledSequence]
    ) -> Float[Tensor, "W V"]:
        """Compute the scheduled tokens in one row; if that fails, it may be done again, or in parts.

        Returns:
            The logits after each sequence's last token that needs them; then those after the tokens of prompts whose
            log-probabilities are wanted.
        """
        ids: list[int] = []
        positions: list[int] = []
        last_indices: list[int] = []
        prompt_indices: list[int] = []
        spans = []
        for scheduled in (*decodes, *prefills):
            sequence, count = scheduled.sequence, scheduled.num_tokens
            first, prefix_length = sequence.num_computed_tokens, sequence.request.prefix_length
            start = prefix_length + first
            prompt_indices.extend(range(len(ids), len(ids) + scheduled.num_prompt_logits))
            ids.extend(sequence.token_ids[first : first + count])
            position = start if self.encoder_cache is None else first
            positions.extend(range(position, position + count))
            spans.append(QuerySpan(sequence.slot, start, count, prefix_length))
            if scheduled.needs_logits:
                last_indices.append(len(ids) - 1)
        wanted = torch.tensor([*last_indices, *prompt_indices] or [len(ids) - 1], device=self.backbone.device)
        slot_attention = SlotAttention(self.kv_cache, spans[: len(decodes)], spans[len(decodes) :])
        backend: AttentionBackend = slot_attention
        encoded = None
        if self.encoder_cache is not None:
            sequences = [scheduled.sequence for scheduled in decodes]
            backend, encoded = self.encoder_cache.attention(slot_attention, sequences)
        logits_to_keep = wanted if self.backbone.supports_logits_to_keep else None
        with self.backbone.autocast():
            logits = forward_with_backend(
                self.backbone.model,
                self.backbone.layout,
                torch.tensor([ids], device=self.backbone.device),
                torch.tensor([positions], device=self.backbone.device),
                backend,
                logits_to_keep,
                encoded,
            )[0]
        if self.encoder_cache is not None:
            self.encoder_cache.computed([scheduled.sequence for scheduled in decodes])
        # Where every token has its own, as in a decoder's step, they are not copied.
        every = len(last_indices) == len(ids) and not prompt_indices
        return logits if logits_to_keep is not None or every else logits[wanted]

    def clear(self, sequence: TokenSequence) -> None:
        """Leave nothing of a sequence in its slot."""
        # A failed step may have written behind the computed tokens.
        length = sequence.request.prefix_length + len(sequence.token_ids)
        self.kv_cache.wipe(sequence.slot, min(length, self.kv_cache.capacity))
        if self.encoder_cache is not None:
            self.encoder_cache.wipe(sequence.slot)
