"""Runs the model for texts that have their keys and values in pools: their prefixes, prompts, and next tokens."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.injection import AttentionBackend
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import Span, StepAttention, attends_by_pages, page_numbers
from prefixtune.engine.encoder_cache import EncoderCache
from prefixtune.engine.kv_cache import PAGE, KVCache, bytes_per_position
from prefixtune.engine.request import Request
from prefixtune.engine.scheduler import ScheduledSequence
from prefixtune.engine.sequence import TokenSequence
from prefixtune.prefix.geometry import Site
from prefixtune.utils.machine import free_memory

__all__ = ["ModelRunner"]


_CPU_SHARE, _GPU_SHARE = 0.5, 0.8
"""Of free memory, for keys and values, where nothing else is said."""


class ModelRunner:
    """A frozen model, and the keys and values of all running texts.

    Args:
        backbone: The model, decoder-only or encoder-decoder.
        num_texts: Texts that run at once.
        max_length: Most positions of a text.
        cache_bytes: Memory for keys and values; 0: a share of what is free, but no more than all texts can need.

    Attributes:
        caches: Keys and values of prefixes, prompts and texts (of an encoder-decoder's decoder); and of sources.
        encoder_cache: What an encoder-decoder's decoder sees of sources; None: a decoder-only model.

    Raises:
        ConfigError: Memory has no room for the keys and values.
    """

    def __init__(self, backbone: Backbone, num_texts: int, max_length: int, cache_bytes: int = 0) -> None:
        self.backbone = backbone
        has_encoder = backbone.kind == "encoder-decoder"
        sites: tuple[Site, ...] = ("decoder", "cross") if has_encoder else ("decoder",)
        device, dtype = backbone.device, backbone.dtype
        self._by_pages = attends_by_pages(device)
        per_position = sum(bytes_per_position(backbone.geometry[site], dtype) for site in sites)
        num_positions = cache_bytes // per_position
        if not cache_bytes:
            share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
            # Prefixes do not count in an encoder-decoder's length.
            most = num_texts * (2 if has_encoder else 1) * (max_length + PAGE)
            num_positions = min(int(free_memory(device) * share) // per_position, most)
        self.caches = [
            KVCache(backbone.geometry[site], num_positions, dtype, device, num_texts, site=site, page=PAGE)
            for site in sites
        ]
        self.encoder_cache = EncoderCache(backbone, self.caches[1]) if has_encoder else None

    def positions(self, request: Request) -> tuple[int, ...]:
        """How many positions a text of a request needs of each pool."""
        # The last token needs none; without new tokens, the prompt's last one does.
        new = max(1, request.sampling.max_new_tokens) - 1
        if self.encoder_cache is None:
            return (request.prefix_length + len(request.prompt) + new,)
        prefix = request.prefix
        return (request.prefix_length + 1 + new, len(request.prompt) + (prefix.length("cross") if prefix else 0))

    def take_room(self, sequence: TokenSequence) -> bool:
        """Reserve all that a text may need; False: there is no room now, and nothing is reserved."""
        runs: list[range] = []
        for cache, length in zip(self.caches, self.positions(sequence.request), strict=True):
            run = cache.take(length)
            if run is None:
                for taken, other in zip(runs, self.caches, strict=False):
                    other.give_back(taken, 0)
                return False
            runs.append(run)
        sequence.runs = tuple(runs)
        return True

    def give_room_back(self, sequence: TokenSequence) -> None:
        """Let others have the room of a text that has ended."""
        # A step that failed may have written behind the computed tokens.
        written = (sequence.request.prefix_length + len(sequence.token_ids), 2**62)
        for cache, run, length in zip(self.caches, sequence.runs, written, strict=False):
            cache.give_back(run, min(length, len(run)))
        sequence.runs = ()
        if self.encoder_cache is not None:
            self.encoder_cache.forget(sequence)

    def load_prefix(self, sequence: TokenSequence) -> None:
        """Copy a text's prefix to its first positions."""
        if sequence.request.prefix is not None:
            self.caches[0].put(sequence.runs[0], sequence.request.prefix)

    def encode(self, sequence: TokenSequence) -> None:
        """Let the encoder read a text's source."""
        if self.encoder_cache is None:
            raise RuntimeError("a decoder-only model has no encoder")
        self.encoder_cache.encode(sequence)
        sequence.num_unencoded = 0

    def share_prompt(self, sequence: TokenSequence, computed: TokenSequence) -> None:
        """Copy what was computed of the prompt for another text of the same request."""
        if self.encoder_cache is not None:
            self.encoder_cache.share(sequence, computed)
            sequence.num_unencoded = 0
            return
        # Without the prompt's last token: each text samples its own next token after it.
        sequence.num_computed_tokens = sequence.num_input_ids - 1
        sequence.prompt_tokens = computed.prompt_tokens
        length = sequence.request.prefix_length + sequence.num_computed_tokens
        self.caches[0].copy(computed.runs[0], sequence.runs[0], length)

    def forward(self, scheduled: Sequence[ScheduledSequence]) -> Float[Tensor, "W V"]:
        """Compute the scheduled tokens in one row; texts with one token come first.

        Returns:
            The logits after each text's last token that needs them; then those after the tokens of prompts whose
            log-probabilities are wanted.
        """
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        last_indices: list[int] = []
        prompt_indices: list[int] = []
        spans = []
        for work in scheduled:
            sequence, count = work.sequence, work.num_tokens
            first, prefix_length = sequence.num_computed_tokens, sequence.request.prefix_length
            start = prefix_length + first
            prompt_indices.extend(range(len(ids), len(ids) + work.num_prompt_logits))
            ids.extend(sequence.token_ids[first : first + count])
            position = start if self.encoder_cache is None else first
            positions.extend(range(position, position + count))
            place = sequence.runs[0].start + start
            places.extend(range(place, place + count))
            spans.append(Span(sequence.runs[0], start, count, prefix_length))
            if work.needs_logits:
                last_indices.append(len(ids) - 1)
        sequences = [work.sequence for work in scheduled]
        wanted = [*last_indices, *prompt_indices] or [len(ids) - 1]
        spans_by_cache = [spans, *([self.encoder_cache.spans(sequences)] if self.encoder_cache else [])]
        pages = [page_numbers(of_one, self.caches[0].page) for of_one in spans_by_cache if self._by_pages]
        row, at, to, kept, *tables = _moved([ids, positions, places, wanted, *chain(*pages)], self.backbone.device)
        attentions = []
        for number, (cache, of_one) in enumerate(zip(self.caches, spans_by_cache, strict=True)):
            own = [table.int() for table in tables[4 * number : 4 * number + 4]]
            attentions.append(StepAttention(cache, of_one, to if number == 0 else None, own))
        backend: AttentionBackend = attentions[0]
        encoded = None
        if self.encoder_cache is not None:
            backend, encoded = self.encoder_cache.attention(attentions[0], attentions[1], sequences)
        logits_to_keep = kept if self.backbone.supports_logits_to_keep else None
        with self.backbone.autocast():
            logits = forward_with_backend(
                self.backbone.model, self.backbone.layout, row[None], at[None], backend, logits_to_keep, encoded
            )[0]
        # Where every token has its own, as in a decoder's step, they are not copied.
        every = len(last_indices) == len(ids) and not prompt_indices
        return logits if logits_to_keep is not None or every else logits[kept]


def _moved(numbers: Sequence[Sequence[int]], device: torch.device) -> Sequence[Int[Tensor, " _"]]:
    """Lists of numbers as tensors on a device, in one transfer that nobody waits for."""
    whole = torch.tensor(list(chain(*numbers)), pin_memory=device.type == "cuda")
    parts: Sequence[Tensor] = whole.to(device, non_blocking=True).split(list(map(len, numbers)))
    return parts
