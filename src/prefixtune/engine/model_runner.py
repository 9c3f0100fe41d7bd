"""Runs the model for sequences in slots: their prefixes, their prompts, and the forward pass of a step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import Future, wait
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.injection import AttentionBackend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.engine.attention import SlotAttention
from prefixtune.engine.decode_graphs import DecodeGraphs, can_capture
from prefixtune.engine.decoder_layers import DecoderLayers, find_layers
from prefixtune.engine.decoder_step import DecoderStep
from prefixtune.engine.encoder_cache import EncoderCache
from prefixtune.engine.kv_cache import UNBOUNDED, KVCache
from prefixtune.engine.native import load_kernel
from prefixtune.engine.native.decoder import DecoderKernel, decoder_kernel
from prefixtune.engine.scheduler import ScheduledSequence
from prefixtune.engine.sequence import TokenSequence
from prefixtune.engine.span import QuerySpan

__all__ = ["ModelRunner"]

_log = logging.getLogger(__name__)
_KERNEL_SECONDS = 0.5
"""How long a new engine waits for compiled code: enough to load it, not to compile it."""


class ModelRunner:
    """A frozen model and the keys and values of all slots.

    Args:
        backbone: The model, decoder-only or encoder-decoder.
        num_slots: Sequences that run at once.
        max_length: Most positions of a slot. An encoder-decoder's slots are not limited here: the engine limits source
            and output, where prefixes do not count.
        native_attention: Whether compiled code may compute the attention (see `engine.native`).
        cuda_graphs: Whether steps may be replayed as CUDA graphs (see `decode_graphs`).

    Attributes:
        kv_cache: Keys and values of prefixes, prompts and texts (of an encoder-decoder's decoder).
        encoder_cache: What an encoder-decoder's decoder sees of sources; None: a decoder-only model.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_slots: int,
        max_length: int,
        native_attention: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.backbone = backbone
        self._native_attention = native_attention and backbone.device.type == "cpu"
        self._step: DecoderStep | None = None
        # Of a model whose step can be computed, until it is known whether it is.
        self._pending: tuple[DecoderLayers, Future[DecoderKernel | None]] | None = None
        if self._native_attention:
            load_kernel(_KERNEL_SECONDS)
            layers = find_layers(backbone)
            if layers is not None:
                self._pending = layers, decoder_kernel()
                compiled: list[Future[Any]] = [self._pending[1], norm_kernel()]
                wait(compiled, _KERNEL_SECONDS)
                self._compiled_step()
        has_encoder = backbone.kind == "encoder-decoder"
        captures = cuda_graphs and can_capture(backbone)
        if cuda_graphs and not captures:
            _log.warning("steps run without CUDA graphs: they are for decoder-only models on one CUDA device.")
        self.kv_cache = KVCache(
            backbone.geometry["decoder"],
            num_slots + captures,
            UNBOUNDED if has_encoder else max_length,
            backbone.dtype,
            backbone.device,
        )
        self.encoder_cache = EncoderCache(backbone, num_slots) if has_encoder else None
        self._graphs = DecodeGraphs(backbone, self.kv_cache) if captures else None

    @property
    def shares_prefixes(self) -> bool:
        """Whether long prefixes of new sequences stay where they are, once for all that have them.

        Compiled code reads them there. Torch does so for one sequence at a time only, and recorded steps do not, so for
        these they are copied into the slots. Once true, it stays true.
        """
        kernel = load_kernel() if self._native_attention and self._graphs is None else None
        return kernel is not None and kernel.computes_for(self.backbone)

    def load_prefix(self, sequence: TokenSequence) -> None:
        """Make a sequence's prefix readable: where it is, or copied into the sequence's slot."""
        prefix = sequence.request.prefix
        if prefix is not None:
            sequence.shared_prefix = self.kv_cache.prefixes.get(prefix) if self.shares_prefixes else None
            if sequence.shared_prefix is None:
                self.kv_cache.put(sequence.slot, prefix)

    def encode(self, sequences: Sequence[TokenSequence]) -> None:
        """Let the encoder read the sequences' sources."""
        if self.encoder_cache is None:
            raise RuntimeError("a decoder-only model has no encoder")
        self.encoder_cache.encode(sequences, share_prefixes=self.shares_prefixes)
        for sequence in sequences:
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
        sequence.shared_prefix = computed.shared_prefix
        self.kv_cache.copy(computed.slot, sequence.slot, sequence.num_prefix_columns + sequence.num_computed_tokens)

    def reserve(self, scheduled: ScheduledSequence) -> None:
        """Let the slots grow if the scheduled tokens need it."""
        sequence = scheduled.sequence
        self.kv_cache.reserve(sequence.num_prefix_columns + sequence.num_computed_tokens + scheduled.num_tokens)

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
            spans.append(QuerySpan(sequence.slot, start, count, prefix_length, sequence.shared_prefix))
            if scheduled.needs_logits:
                last_indices.append(len(ids) - 1)
        wanted = torch.tensor([*last_indices, *prompt_indices] or [len(ids) - 1], device=self.backbone.device)
        if (step := self._compiled_step()) is not None:
            return step(ids, positions, self.kv_cache, spans, wanted)
        if self._graphs is not None and not prefills and len(last_indices) == len(decodes):
            replayed = self._graphs(ids, spans)
            if replayed is not None:
                return replayed
        kernel = load_kernel() if self._native_attention else None
        slot_attention = SlotAttention(self.kv_cache, spans[: len(decodes)], spans[len(decodes) :], kernel=kernel)
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

    def _compiled_step(self) -> DecoderStep | None:
        """The step by compiled code, once that is made and found to compute the same."""
        attention = load_kernel() if self._native_attention else None
        # It is compared with the modules, whose norms must be compiled ones, too.
        if self._pending is not None and attention and self._pending[1].done() and norm_kernel().done():
            (layers, future), self._pending = self._pending, None
            kernel = future.result()
            self._step = None if kernel is None else DecoderStep.make(self.backbone, layers, kernel, attention)
        return self._step

    def clear(self, sequence: TokenSequence) -> None:
        """Leave nothing of a sequence in its slot."""
        # A failed step may have written behind the computed tokens.
        length = sequence.num_prefix_columns + len(sequence.token_ids)
        self.kv_cache.wipe(sequence.slot, min(length, self.kv_cache.capacity))
        sequence.shared_prefix = None
        if self.encoder_cache is not None:
            self.encoder_cache.wipe(sequence.slot)
