"""The engine: requests in, pieces of text out, one step of the model at a time.

Every step computes the next token of all running texts, and pieces of new prompts beside them, in one forward pass over
one row. Requests join and leave between steps; each has its own prefix, or none. An encoder-decoder reads a request's
prompt with its encoder when the request gets a slot, and writes from there on. Texts that share a request share what
was computed of its prompt.

    engine = Engine(backbone)
    engine.add(Request(prompt, prefix))
    while engine.busy:
        for output in engine.step():
            print(output.text)

`add` and `cancel` may be called from any thread; `step` from one at a time.

In float32 a greedy text is the same alone and in any mix, token for token. In bfloat16, sums are rounded otherwise when
a product has other rows beside, which may turn a close choice between two tokens.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from prefixtune.attention.forward import forward_with_backend
from prefixtune.attention.injection import AttentionBackend
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prepack import prepack
from prefixtune.engine.attention import SlotAttention
from prefixtune.engine.encoder_cache import EncoderCache
from prefixtune.engine.kv_cache import KVCache, Span
from prefixtune.engine.request import (
    ContextLengthError,
    EngineFull,
    FinishReason,
    Request,
    SequenceOutput,
    Token,
    join_outputs,
)
from prefixtune.engine.sampler import sample
from prefixtune.engine.scheduler import ScheduledSequence, Scheduler
from prefixtune.engine.sequence import TokenSequence
from prefixtune.errors import BackboneError, ConfigError, PrefixError, RequestError, describe_value
from prefixtune.inference.detokenizer import Detokenizer
from prefixtune.prefix.prefix import check_fits
from prefixtune.utils.options import as_config, check_names, fit_types

__all__ = ["Engine", "EngineConfig", "RunningSequence"]


_HINT = "leave the option out to have its default."
DEFAULT_MAX_LENGTH = 4096
"""Positions of a slot where the backbone names no limit."""
_CONTEXT = 4
"""Tokens of a prompt beside which a text is decoded."""
UNBOUNDED = 2**31
"""Positions of an encoder-decoder's slots, which are bounded where requests are taken: prefixes do not count there."""


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine does at once.

    Attributes:
        num_slots: Texts that run at once.
        max_length: Most positions of a text, prefix included (for an encoder-decoder: of what it reads, and of what it
            writes, without the prefix); 0: the backbone's.
        prefill_tokens: Most prompt tokens computed in a step beside texts that are being written: bounds how long a
            long prompt holds them up. Where none is, four times as many.
        max_waiting: Texts that may wait for a slot; a request beyond them is refused.
        prepack: On a CPU, keep a copy of a bf16 backbone's matrices as its products want them (see `prepack`).

    Raises:
        ConfigError: A value is out of range.
    """

    num_slots: int = 32
    max_length: int = 0
    prefill_tokens: int = 256
    max_waiting: int = 10_000
    prepack: bool = True

    def __new__(cls, *_: Any, **values: Any) -> EngineConfig:
        """Refuse unknown names, with the nearest known one."""
        check_names(cls, values, "EngineConfig has no such option", _HINT)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        least = {"num_slots": 1, "max_length": 0, "prefill_tokens": 1, "max_waiting": 1}
        wrong = fit_types(self)
        faults = [*wrong.values()] + [
            f"{name} is {getattr(self, name)}, but must be at least {low}"
            for name, low in least.items()
            if name not in wrong and getattr(self, name) < low
        ]
        if faults:
            raise ConfigError("; ".join(faults) + ".", hint=_HINT)

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> EngineConfig:
        """From keys and values.

        Raises:
            ConfigError: An unknown key, with the nearest known one, or a value that is not allowed.
        """
        return cls(**values)


@dataclass(frozen=True)
class RunningSequence:
    """A text that has a slot.

    Attributes:
        slot: Which.
        request_id: The request's id.
        index: Which of its texts.
        tenant: For whom.
        prefix_name: What its prefix is called; empty: nobody said, or it has none.
        prompt_tokens: Of the prompt.
        computed: Of prompt and text: how many tokens were computed.
        new_tokens: Written so far.
    """

    slot: int
    request_id: str
    index: int
    tenant: str
    prefix_name: str
    prompt_tokens: int
    computed: int
    new_tokens: int


class Engine:
    """Continuous batching over one frozen model, decoder-only or encoder-decoder.

    Args:
        backbone: The model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        config: How much at once: an `EngineConfig` or a dict.
        **options: Fields of `EngineConfig`, in place of `config`.

    Attributes:
        backbone: The model that it runs: the given one, or what was made of it to be quicker.
        batch_size: Texts that the last step computed something of.

    Raises:
        BackboneError: The model's texts cannot stand side by side in one row.
        ConfigError: A wrong option, or something that is no backbone.
    """

    def __init__(
        self, backbone: BackboneLike, config: EngineConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.config = as_config(EngineConfig, config, options)
        backbone = as_backbone(backbone)
        if backbone.kind == "encoder":
            raise BackboneError(
                f"{backbone.name!r} is an encoder, which reads text and writes none.",
                hint="use it for classification or tagging, or choose a model that generates.",
            )
        if not backbone.layout.packable:
            raise BackboneError(
                f"{backbone.name!r} (kind {backbone.kind}) cannot run texts side by side in one row.",
                hint="use `generate`, which batches whole requests.",
            )
        if self.config.prepack:
            backbone = prepack(backbone)
        self.backbone = backbone
        limits = (self.config.max_length, backbone.max_positions, _steady_length(backbone))
        self.max_length = min((limit for limit in limits if limit), default=DEFAULT_MAX_LENGTH)
        self.cache = KVCache(
            backbone.geometry["decoder"],
            self.config.num_slots,
            self.max_length if backbone.kind == "decoder" else UNBOUNDED,
            backbone.dtype,
            backbone.device,
        )
        self.sources = EncoderCache(backbone, self.config.num_slots) if backbone.kind == "encoder-decoder" else None
        self.scheduler = Scheduler(self.config.num_slots, self.config.prefill_tokens)
        self.batch_size = 0
        self._vocabulary = int(backbone.model.get_input_embeddings().weight.shape[0])
        self._sequences: dict[str, list[TokenSequence]] = {}
        self._lock = threading.Lock()
        self._cancelled: dict[str, FinishReason] = {}

    # --- what others ask ----------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineFull: Too many texts wait.
            RequestError: It does not fit a slot, names tokens that the model does not have, its prefix is an infix, or
                its id is in use.
            BackboneError: Its prefix does not fit the backbone.
        """
        if not isinstance(request, Request):
            raise RequestError(
                f"the request is {describe_value(request)}, not a Request.",
                hint="write Request(tuple(engine.backbone.encode(text)), prefix).",
            )
        if request.prefix is not None:
            check_fits(request.prefix, self.backbone.geometry, self.backbone.name)
            if request.prefix.placement != "front":
                raise RequestError(
                    f"the prefix stands as {request.prefix.placement}, which the engine does not serve.",
                    hint="use `generate` for it.",
                )
        sizes = len(request.prompt), request.prefix_length
        if request.sampling.max_new_tokens > self.room(*sizes):
            raise ContextLengthError(
                f"the request needs {self.needs(*sizes, request.sampling.max_new_tokens)}.",
                hint="shorten the text or lower max_new_tokens.",
            )
        # In a step with others, an unknown token would fail them all.
        unknown = [token for token in (*request.prompt, *request.sampling.banned) if not 0 <= token < self._vocabulary]
        if unknown:
            raise RequestError(
                f"there is no token {unknown[0]}: the model has {self._vocabulary:,}.",
                hint="encode the text with the backbone's own tokenizer.",
            )
        start, first = (
            (None, None) if self.sources is None else (self.backbone.decoder_start_id, self.backbone.forced_bos_id)
        )
        made = [TokenSequence(request, index, self._text_of(request), start, first) for index in range(request.n)]
        with self._lock:
            if request.id in self._sequences:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            waiting = self.scheduler.num_waiting
            if waiting + request.n > self.config.max_waiting:
                raise EngineFull(
                    f"{waiting} texts wait already, and {self.config.max_waiting} may.", hint="try again later."
                )
            self._sequences[request.id] = made
            self.scheduler.add(made)

    def _text_of(self, request: Request) -> Detokenizer:
        # What a decoder writes after an encoder has read begins anew.
        context = request.prompt[-_CONTEXT:] if self.sources is None else ()
        return Detokenizer(self.backbone.decode, request.sampling.stop, verbatim=request.verbatim, context=context)

    def room(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be written after a prompt; 0 or below: the prompt is too long itself."""
        if self.sources is None:
            # The last token takes no position.
            return self.max_length - prefix_length - prompt_tokens + 1
        return self.max_length - 1 if prompt_tokens <= self.max_length else 0

    def needs(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> str:
        """What a request takes and what there is, in words."""
        if self.sources is None:
            return (
                f"{prefix_length} (prefix) + {prompt_tokens} (text) + {new_tokens} (new) positions, but "
                f"{self.max_length} are there"
            )
        return (
            f"{prompt_tokens} (text) and {new_tokens} (new) positions, but {self.max_length} are there on either side"
        )

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """Give a request up: its slots are free before the next step. Unknown names are passed over."""
        with self._lock:
            if request_id in self._sequences:
                self._cancelled.setdefault(request_id, reason)

    @property
    def busy(self) -> bool:
        """Whether there is anything to do."""
        return bool(self._sequences)

    @property
    def num_running(self) -> int:
        """Texts that have a slot."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Texts that wait for one."""
        return self.scheduler.num_waiting

    def running_sequences(self) -> tuple[RunningSequence, ...]:
        """The texts that have a slot, by slot."""
        with self._lock:
            running = sorted(self.scheduler.running, key=lambda sequence: sequence.slot)
            return tuple(
                RunningSequence(
                    s.slot,
                    s.request.id,
                    s.index,
                    s.request.tenant,
                    s.request.prefix_name,
                    len(s.request.prompt),
                    s.num_read,
                    s.num_new,
                )
                for s in running
            )

    def run(self, requests: Sequence[Request]) -> list[list[SequenceOutput]]:
        """Do some requests to their end.

        Returns:
            For each request and each of its texts in order, one `SequenceOutput` with everything.

        Raises:
            PrefixError: As `add`; then none of them is done.
        """
        added: list[str] = []
        try:
            for request in requests:
                self.add(request)
                added.append(request.id)
        except PrefixError:
            for name in added:
                self.cancel(name)
            raise
        pieces: dict[tuple[str, int], list[SequenceOutput]] = {}
        while self.busy:
            for output in self.step():
                pieces.setdefault((output.request_id, output.index), []).append(output)
        return [[join_outputs(pieces[request.id, index]) for index in range(request.n)] for request in requests]

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Compute one step; returns what it brought.

        A text whose prefix cannot be put into its slot, for which memory does not suffice or whose logits are not
        finite, ends with `error`, and no other does. If the model fails, every text of the step ends so, and the engine
        goes on with the others.
        """
        with self._lock:
            outputs = self._drop_cancelled()
            admitted = self.scheduler.admit()
        for sequence in admitted:
            try:
                if sequence.request.prefix is not None:
                    self.cache.put(sequence.slot, sequence.request.prefix)
            except Exception as error:
                outputs.append(self._fail(sequence, error))
        with self._lock:
            sources = self.scheduler.sources()
        for sequence in sources:
            try:
                self._read(sequence)
            except Exception as error:
                outputs.append(self._fail(sequence, error))
        with self._lock:
            for sequence, other in self.scheduler.followers():
                self._share(sequence, other)
            singles, prompts = self.scheduler.plan()
        singles, prompts = self._make_room(singles, outputs), self._make_room(prompts, outputs)
        self.batch_size = len(singles) + len(prompts)
        if not self.batch_size:
            return outputs
        try:
            logits = self._compute(singles, prompts)
            decided = [work.sequence for work in (*singles, *prompts) if work.wants_logits]
            tokens = sample(logits, decided, self.backbone.eos_id) if decided else []
        except Exception as error:
            return outputs + [self._fail(work.sequence, error) for work in (*singles, *prompts)]
        for work in (*singles, *prompts):
            work.sequence.num_computed_tokens += work.count
        return outputs + [self._take(sequence, token) for sequence, token in zip(decided, tokens, strict=True)]

    def _read(self, sequence: TokenSequence) -> None:
        """Let the encoder read a text's source."""
        if self.sources is None:
            raise RuntimeError("no encoder")
        self.sources.read(sequence)
        sequence.to_encode = 0

    def _share(self, sequence: TokenSequence, other: TokenSequence) -> None:
        """Give a text what was computed of its prompt for another one of the same request."""
        if self.sources is not None:
            self.sources.share(sequence, other)
            sequence.to_encode = 0
            return
        # The prompt's last token stays: what follows from it is each text's own.
        sequence.num_computed_tokens = sequence.num_given - 1
        self.cache.copy(other.slot, sequence.slot, sequence.request.prefix_length + sequence.num_computed_tokens)

    def _make_room(self, works: Sequence[ScheduledSequence], outputs: list[SequenceOutput]) -> list[ScheduledSequence]:
        """Let the slots grow where a text needs it; a text for which memory does not suffice ends."""
        kept = []
        for work in works:
            sequence = work.sequence
            try:
                self.cache.reserve(sequence.request.prefix_length + sequence.num_computed_tokens + work.count)
                kept.append(work)
            except Exception as error:
                outputs.append(self._fail(sequence, error))
        return kept

    def _compute(self, singles: Sequence[ScheduledSequence], prompts: Sequence[ScheduledSequence]) -> torch.Tensor:
        """The logits after every piece that ends its text so far."""
        ids: list[int] = []
        positions: list[int] = []
        ends: list[int] = []
        spans = []
        for work in (*singles, *prompts):
            sequence, first = work.sequence, work.sequence.num_computed_tokens
            start = sequence.request.prefix_length + first
            ids.extend(sequence.ids[first : first + work.count])
            counted = start if self.sources is None else first
            positions.extend(range(counted, counted + work.count))
            spans.append(Span(sequence.slot, start, work.count, sequence.request.prefix_length))
            if work.wants_logits:
                ends.append(len(ids) - 1)
        step = SlotAttention(self.cache, spans[: len(singles)], spans[len(singles) :])
        serving: AttentionBackend = step
        encoded = None
        if self.sources is not None:
            serving, encoded = self.sources.begin(step, [work.sequence for work in singles])
        device = self.backbone.device
        chosen = torch.tensor(ends or [len(ids) - 1], device=device)
        keeps = chosen if self.backbone.supports_logits_to_keep else None
        with self.backbone.autocast():
            logits = forward_with_backend(
                self.backbone.model,
                self.backbone.layout,
                torch.tensor([ids], device=device),
                torch.tensor([positions], device=device),
                serving,
                keeps,
                encoded,
            )[0]
        return logits if keeps is not None else logits[chosen]

    def _take(self, sequence: TokenSequence, token: Token | str) -> SequenceOutput:
        """Add a chosen token to a text, or end it where there is none."""
        rules, text = sequence.request.sampling, sequence.text
        if isinstance(token, str):
            return self._finish(sequence, "error", error=token)
        if token.id == self.backbone.eos_id:
            return self._finish(sequence, "stop", (), text.finish())
        sequence.ids.append(token.id)
        piece = text.add(token.id)
        if text.stopped:
            return self._finish(sequence, "stop", (token,), piece)
        if sequence.num_new >= rules.max_new_tokens:
            return self._finish(sequence, "length", (token,), piece + text.finish())
        return SequenceOutput(sequence.request.id, sequence.index, (token,), piece)

    def _finish(
        self,
        sequence: TokenSequence,
        reason: FinishReason,
        tokens: tuple[Token, ...] = (),
        text: str = "",
        error: str = "",
    ) -> SequenceOutput:
        with self._lock:
            self._end(sequence, reason)
            name = sequence.request.id
            if all(each.finish_reason for each in self._sequences.get(name, ())):
                self._sequences.pop(name, None)
                self._cancelled.pop(name, None)
        return SequenceOutput(sequence.request.id, sequence.index, tokens, text, reason, error)

    def _end(self, sequence: TokenSequence, reason: FinishReason) -> None:
        """Mark a text as ended and free its slot; the lock is held."""
        sequence.finish_reason = reason
        if sequence.slot >= 0:
            # A failed step may have written behind what counts as computed.
            length = sequence.request.prefix_length + len(sequence.ids)
            self.cache.wipe(sequence.slot, min(length, self.cache.capacity))
            if self.sources is not None:
                self.sources.wipe(sequence.slot)
        self.scheduler.release(sequence)

    def _fail(self, sequence: TokenSequence, error: Exception) -> SequenceOutput:
        return self._finish(sequence, "error", error=f"{type(error).__name__}: {error}")

    def _drop_cancelled(self) -> list[SequenceOutput]:
        """Free the slots of requests that were given up; the lock is held."""
        outputs = []
        for name, reason in self._cancelled.items():
            for sequence in self._sequences.pop(name, ()):
                if sequence.finish_reason is None:
                    self._end(sequence, reason)
                    outputs.append(SequenceOutput(name, sequence.index, (), "", reason))
        self._cancelled.clear()
        return outputs


def _steady_length(backbone: Backbone) -> int:
    """Up to which length a text's rotary embedding is the same whatever others are in the row; 0: at any.

    LongRoPE turns all positions of a call differently as soon as one of them is beyond what the model was first made
    for.
    """
    settings = getattr(backbone.model.config.get_text_config(decoder=True), "rope_parameters", None) or {}
    # Of all layers, or by kind of layer.
    each = [settings, *(value for value in settings.values() if isinstance(value, dict))]
    bounds = [int(one["original_max_position_embeddings"]) for one in each if one.get("rope_type") == "longrope"]
    return min(bounds, default=0)
