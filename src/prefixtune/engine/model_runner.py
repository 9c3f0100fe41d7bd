"""Runs the model for texts that have their keys and values in pools: their prefixes, prompts, and next tokens.

The encoder of an encoder-decoder reads a source in one piece. The source's cross-attention keys and values are computed
in the text's first step, in the same pass as all other texts' tokens, and kept in a pool of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from jaxtyping import Float, Int
from torch import Tensor

from prefixtune.attention.forward import forward_with_backend, run_encoder
from prefixtune.attention.record import relative_bias
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.attention import Span, StepAttention, attends_by_pages, page_numbers
from prefixtune.engine.kv_cache import FLASH_PAGE, PAGE, KVCache, Pages, bytes_per_position
from prefixtune.engine.request import Request
from prefixtune.engine.scheduler import ScheduledSequence
from prefixtune.engine.sequence import TokenSequence
from prefixtune.prefix.geometry import Site
from prefixtune.utils.machine import free_memory

_CPU_SHARE, _GPU_SHARE = 0.5, 0.8
"""Of free memory, for keys and values, by default."""
_FIRST_BIAS_LENGTH = 256
"""Distances at first; twice as many as needed later."""


class ModelRunner:
    """A frozen model, and the keys and values of all running texts.

    Args:
        backbone: The model, decoder-only or encoder-decoder.
        num_texts: Texts that run at once.
        max_length: Most positions of a text.
        cache_bytes: Memory for keys and values; 0: a share of what is free, but no more than all texts can need.

    Attributes:
        caches: Keys and values of prefixes, prompts and texts (of an encoder-decoder's decoder); and of sources.
        has_encoder: Whether it is an encoder-decoder.

    Raises:
        ConfigError: Memory has no room for the keys and values.
    """

    def __init__(self, backbone: Backbone, num_texts: int, max_length: int, cache_bytes: int = 0) -> None:
        self.backbone = backbone
        self.has_encoder = has_encoder = backbone.kind == "encoder-decoder"
        sites: tuple[Site, ...] = ("decoder", "cross") if has_encoder else ("decoder",)
        device, dtype = backbone.device, backbone.dtype
        self._by_pages = attends_by_pages(device)
        page = FLASH_PAGE if self._by_pages else PAGE
        per_position = sum(bytes_per_position(backbone.geometry[site], dtype) for site in sites)
        num_positions = cache_bytes // per_position
        if not cache_bytes:
            share = _CPU_SHARE if device.type == "cpu" else _GPU_SHARE
            # Prefixes do not count in an encoder-decoder's length.
            most = num_texts * (2 if has_encoder else 1) * (max_length + page)
            num_positions = min(int(free_memory(device) * share) // per_position, most)
        self.caches = [
            KVCache(backbone.geometry[site], num_positions, dtype, device, site=site, page=page) for site in sites
        ]
        self._texts: list[TokenSequence] = []
        # The sources whose keys and values the next step computes; and what the pass reads if there is none.
        self._new_sources: dict[TokenSequence, Float[Tensor, "1 S E"]] = {}
        self._placeholder: Float[Tensor, "1 1 E"] | None = None
        self._bias_by_layer: dict[int, Float[Tensor, "Hq N"]] = {}
        self._bias_length = 0

    def positions(self, request: Request) -> tuple[int, ...]:
        """How many positions a text of a request needs of each pool."""
        # The last token needs none; without new tokens, the prompt's last one does.
        new = max(1, request.sampling.max_new_tokens) - 1
        if not self.has_encoder:
            return (request.prefix_length + len(request.prompt) + new,)
        return (request.prefix_length + 1 + new, _source_length(request))

    def take_room(self, sequence: TokenSequence) -> bool:
        """Reserve all that a text may need; False: there is no room now, and nothing is reserved.

        It begins with pages of a running text that begins alike: of its own request, or with its prefix.
        """
        request, prefix, taken = sequence.request, sequence.request.prefix, list[Pages]()
        # Each text computes the prompt's last token itself, for its own next token.
        prompts = (0, len(request.prompt)) if self.has_encoder else (len(request.prompt) - 1,)
        of_request = [other for other in self._texts if other.request is request]
        alike = of_request or [other for other in self._texts if prefix is not None and other.request.prefix is prefix]
        for number, (cache, length) in enumerate(zip(self.caches, self.positions(request), strict=True)):
            common = 0 if prefix is None else prefix.length(cache.site)
            head = common + (prompts[number] if request.n > 1 else 0)
            same = head if of_request else common
            pages = cache.take(length, alike[0].pages[number].numbers[: same // cache.page] if alike else (), head)
            if pages is None:
                for one, other in zip(taken, self.caches, strict=False):
                    other.give_back(one, 0)
                return False
            taken.append(pages)
        sequence.pages = tuple(taken)
        self._texts.append(sequence)
        return True

    def give_room_back(self, sequence: TokenSequence) -> None:
        """Let others have the room of a text that has ended."""
        if sequence.pages:
            self._texts.remove(sequence)
        # A step that failed may have written behind the computed tokens.
        written = (sequence.request.prefix_length + len(sequence.token_ids), _source_length(sequence.request))
        for cache, pages, length in zip(self.caches, sequence.pages, written, strict=False):
            cache.give_back(pages, length)
        sequence.pages = ()
        self._new_sources.pop(sequence, None)

    def load_prefix(self, sequence: TokenSequence) -> None:
        """Copy a text's prefix to its first positions, as soon as others may have them as well."""
        if sequence.request.prefix is not None:
            for cache, pages in zip(self.caches, sequence.pages, strict=True):
                cache.put(pages, sequence.request.prefix)

    def encode(self, sequence: TokenSequence) -> None:
        """Let the encoder read a text's source."""
        request = sequence.request
        ids = torch.tensor([request.prompt], device=self.backbone.device)
        with self.backbone.autocast():
            source = run_encoder(self.backbone.model, self.backbone.layout, ids, request.prefix)
        if self._placeholder is None:
            self._placeholder = torch.zeros_like(source[:, :1])
        self._new_sources[sequence] = source
        sequence.num_unencoded = 0

    def share_prompt(self, sequence: TokenSequence, computed: TokenSequence) -> None:
        """Copy what was computed of the prompt for another text of the same request."""
        if self.has_encoder:
            self.caches[1].copy(computed.pages[1], sequence.pages[1], _source_length(sequence.request))
            sequence.num_unencoded = 0
            return
        # Without the prompt's last token: each text samples its own next token after it.
        sequence.num_computed_tokens = sequence.num_input_ids - 1
        sequence.prompt_tokens = computed.prompt_tokens
        length = sequence.request.prefix_length + sequence.num_computed_tokens
        self.caches[0].copy(computed.pages[0], sequence.pages[0], length)

    def forward(self, scheduled: Sequence[ScheduledSequence]) -> Float[Tensor, "W V"]:
        """Compute the scheduled tokens in one row; texts with one token come first.

        Returns:
            The logits after each text's last token that needs them; then those after the tokens of prompts whose
            log-probabilities are wanted.
        """
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        source_places: list[int] = []
        last_indices: list[int] = []
        prompt_indices: list[int] = []
        spans = []
        for work in scheduled:
            sequence, count = work.sequence, work.num_tokens
            first, prefix_length = sequence.num_computed_tokens, sequence.request.prefix_length
            start = prefix_length + first
            prompt_indices.extend(range(len(ids), len(ids) + work.num_prompt_logits))
            ids.extend(sequence.token_ids[first : first + count])
            position = first if self.has_encoder else start
            positions.extend(range(position, position + count))
            places.extend(chain(*sequence.pages[0].places(start, start + count)))
            spans.append(Span(sequence.pages[0], start, count, prefix_length))
            if work.needs_logits:
                last_indices.append(len(ids) - 1)
        sequences = [work.sequence for work in scheduled]
        new_sources = {s: self._new_sources.pop(s) for s in sequences if s in self._new_sources}
        for sequence, source in new_sources.items():
            # Behind the prefix.
            stop = _source_length(sequence.request)
            source_places.extend(chain(*sequence.pages[1].places(stop - source.shape[1], stop)))
        wanted = [*last_indices, *prompt_indices] or [len(ids) - 1]
        spans_by_cache = [spans]
        if self.has_encoder:
            # A text's next token sees all of its source.
            spans_by_cache.append([Span(s.pages[1], _source_length(s.request) - 1, 1, 0) for s in sequences])
        pages = [page_numbers(of_one, self.caches[0].page) for of_one in spans_by_cache if self._by_pages]
        numbers = [ids, positions, wanted, places, source_places, *chain(*pages)]
        row, at, kept, to, to_source, *tables = _moved(numbers, self.backbone.device)
        attentions = []
        for cache, of_one, targets in zip(self.caches, spans_by_cache, (to, to_source), strict=False):
            own, tables = [table.int() for table in tables[:4]], tables[4:]
            attentions.append(StepAttention(cache, of_one, targets, own))
        attention, encoded = attentions[0], None
        if self.has_encoder:
            attention.cross = attentions[1]
            attention.bias_by_layer = self._distance_bias(max(span.stop for span in spans))
            encoded = torch.cat(list(new_sources.values()), dim=1) if new_sources else self._placeholder
        logits_to_keep = kept if self.backbone.supports_logits_to_keep else None
        with self.backbone.autocast():
            logits = forward_with_backend(
                self.backbone.model, self.backbone.layout, row[None], at[None], attention, logits_to_keep, encoded
            )[0]
        # Where every token has its own, as in a decoder's step, they are not copied.
        every = len(last_indices) == len(ids) and not prompt_indices
        return logits if logits_to_keep is not None or every else logits[kept]

    def _distance_bias(self, length: int) -> dict[int, Float[Tensor, "Hq N"]]:
        """Per layer, the decoder's bias by distance, for as many distances as there are, and for more later."""
        if length > self._bias_length:
            self._bias_length = max(_FIRST_BIAS_LENGTH, 2 * length)
            self._bias_by_layer = relative_bias(self.backbone.model, self.backbone.layout, self._bias_length)
        return self._bias_by_layer


def _source_length(request: Request) -> int:
    """Positions of a request's prefix and source in the pool of sources."""
    return len(request.prompt) + (0 if request.prefix is None else request.prefix.length("cross"))


def _moved(numbers: Sequence[Sequence[int]], device: torch.device) -> Sequence[Int[Tensor, " _"]]:
    """Lists of numbers as tensors on a device, in one transfer that nobody waits for."""
    whole = torch.tensor(list(chain(*numbers)), pin_memory=device.type == "cuda")
    parts: Sequence[Tensor] = whole.to(device, non_blocking=True).split(list(map(len, numbers)))
    return parts
