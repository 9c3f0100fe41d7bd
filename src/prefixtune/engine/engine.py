"""The engine: requests in, pieces of text out, one step of the model at a time.

Every step computes the next token of all running sequences, and pieces of new prompts, in one forward pass over one
row. Requests join and leave between steps; each has its own prefix, or none. An encoder-decoder reads a request's
prompt with its encoder when the request gets a slot. Sequences of one request share what was computed of its prompt.

    engine = Engine(backbone)
    engine.add(Request(prompt, prefix))
    while engine.busy:
        for output in engine.step():
            print(output.text)

`add` and `cancel` may be called from any thread; `step` from one at a time. Only a step touches slots, without the lock
that callers wait for: copying and wiping them can take a while.

In float32 a greedy text is the same alone and in any mix, token for token. In bfloat16, sums round differently when a
product has other rows as well, which may decide a close choice between two tokens differently.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.model_runner import ModelRunner
from prefixtune.engine.request import (
    ContextLengthError,
    EngineFull,
    FinishReason,
    Request,
    SequenceOutput,
    Token,
    join_outputs,
)
from prefixtune.engine.sampler import NOT_FINITE, prompt_logprobs, sample
from prefixtune.engine.scheduler import ScheduledSequence, Scheduler
from prefixtune.engine.sequence import RunningSequence, TokenSequence
from prefixtune.errors import BackboneError, ConfigError, PrefixError, RequestError, describe_value
from prefixtune.sampling.detokenizer import Detokenizer

__all__ = ["Engine"]


DEFAULT_MAX_LENGTH = 4096
"""Positions of a slot if the backbone has no limit."""
_PROMPT_LOGITS_BYTES = 2**27
"""Of the logits (as float32) of prompts whose log-probabilities are wanted, in one step."""
_CONTEXT_TOKENS = 4
"""Tokens of a prompt with which the first generated tokens are decoded."""

_log = logging.getLogger(__name__)

S = TypeVar("S", TokenSequence, ScheduledSequence)


class Engine:
    """Continuous batching over one frozen model, decoder-only or encoder-decoder.

    Args:
        backbone: The model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        config: An `EngineConfig` or a dict.
        **options: Fields of `EngineConfig`, instead of `config`.

    Attributes:
        backbone: The model that runs.
        max_length: Most positions of a text (see `EngineConfig`).
        vocab_size: Tokens that the model can read.
        batch_size: Sequences of which the last step computed something.

    Raises:
        BackboneError: The model generates no text, cannot compute several texts in one row, or is on several devices.
        ConfigError: A wrong option, something that is no backbone, or more slots than memory has room for or than
            tokens of a row go to one expert.
    """

    def __init__(
        self, backbone: BackboneLike, config: EngineConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.config = EngineConfig.from_arguments(config, options)
        backbone = as_backbone(backbone)
        _check_generates(backbone)
        _check_experts(backbone, self.config.num_slots)
        self.backbone = backbone
        # Beyond a LongRoPE limit a text would turn the keys of all others in its row.
        limits = (self.config.max_length, backbone.max_positions, backbone.longrope_limit)
        self.max_length = min((limit for limit in limits if limit), default=DEFAULT_MAX_LENGTH)
        self.runner = ModelRunner(backbone, self.config.num_slots, self.max_length)
        self._has_encoder = backbone.kind == "encoder-decoder"
        self.vocab_size = int(backbone.model.get_input_embeddings().weight.shape[0])
        max_prompt_logits = max(1, _PROMPT_LOGITS_BYTES // (4 * self.vocab_size))
        self.scheduler = Scheduler(self.config.num_slots, self.config.prefill_tokens, max_prompt_logits)
        self.batch_size = 0
        self._sequences: dict[str, list[TokenSequence]] = {}
        self._lock = threading.Lock()
        self._cancelled: dict[str, FinishReason] = {}

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            EngineFull: Too many texts wait.
            ContextLengthError: It needs more positions than a slot has.
            RequestError: It has tokens that the model does not have or more texts than may wait, or its id is in use.
            BackboneError: Its prefix does not fit the backbone, or was trained for other weights.
        """
        self._check(request)
        with self._lock:
            self._check_queue(request)
        sequences = [self._sequence(request, index) for index in range(request.n)]
        with self._lock:
            # Another thread may have been faster.
            self._check_queue(request)
            self._sequences[request.id] = sequences
            self.scheduler.add(sequences)

    def _check_queue(self, request: Request) -> None:
        """Refuse a request whose id is in use, or for which the queue has no room; the lock is held."""
        if request.id in self._sequences:
            raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
        waiting, limit = self.scheduler.num_waiting, self.config.max_waiting
        if waiting + request.n > limit:
            raise EngineFull(
                f"{waiting:,} texts wait for a slot already; at most {limit:,} may wait.", hint="try again later."
            )

    def _check(self, request: Request) -> None:
        """Refuse what the engine cannot run; in a step, it could fail other requests."""
        if not isinstance(request, Request):
            raise RequestError(
                f"the request is {describe_value(request)}, not a Request.",
                hint="write Request(tuple(engine.backbone.encode(text)), prefix).",
            )
        if request.n > self.config.max_waiting:
            raise RequestError(
                f"n is {request.n:,}, but at most {self.config.max_waiting:,} texts may wait for a slot.",
                hint="lower n, or raise max_waiting.",
            )
        if request.prefix is not None:
            load_prefix(request.prefix, self.backbone)
        if self._has_encoder and request.sampling.prompt_logprobs is not None:
            raise RequestError(
                "an encoder-decoder's encoder reads the prompt, whose tokens then have no log-probabilities.",
                hint="leave prompt_logprobs out, or use a decoder-only model.",
            )
        self.check_length(len(request.prompt), request.prefix_length, request.sampling.max_new_tokens)
        tokens = (*request.prompt, *request.sampling.banned, *request.sampling.logit_bias)
        unknown = [token for token in tokens if not 0 <= token < self.vocab_size]
        if unknown:
            raise RequestError(
                f"there is no token {unknown[0]}: the model has {self.vocab_size:,}.",
                hint="encode the text with the backbone's own tokenizer.",
            )

    def _sequence(self, request: Request, index: int) -> TokenSequence:
        decode, sampling = self.backbone.decode, request.sampling
        context = () if self._has_encoder else request.prompt[-_CONTEXT_TOKENS:]
        text = Detokenizer(decode, sampling.stop, verbatim=request.verbatim, context=context)
        sequence = (
            TokenSequence(request, index, text, self.backbone.decoder_start_id, self.backbone.forced_bos_id)
            if self._has_encoder
            else TokenSequence(request, index, text)
        )
        if request.grammar is not None:
            sequence.grammar = request.grammar.start()
        return sequence

    def available_tokens(self, prompt_tokens: int, prefix_length: int) -> int:
        """Most tokens that can be generated after a prompt; 0 or less: the prompt itself is too long."""
        # An encoder-decoder's start token takes the position that the last token does not.
        if self._has_encoder:
            return self.max_length if prompt_tokens <= self.max_length else 0
        # The last token takes no position.
        return self.max_length - prefix_length - prompt_tokens + 1

    def check_length(self, prompt_tokens: int, prefix_length: int, new_tokens: int) -> None:
        """Refuse a request that needs more positions than a slot has.

        Raises:
            ContextLengthError: It does.
        """
        # Without new tokens the prompt's last one takes a position all the same.
        if max(1, new_tokens) <= self.available_tokens(prompt_tokens, prefix_length):
            return
        if self._has_encoder:
            needed = f"{prompt_tokens} (text) and {new_tokens} (new) positions"
            limit = f"the limit is {self.max_length} on either side"
        else:
            needed = f"{prefix_length} (prefix) + {prompt_tokens} (text) + {new_tokens} (new) positions"
            limit = f"the limit is {self.max_length}"
        if self.max_length == self.backbone.longrope_limit:
            limit += " (the model's original length, before LongRoPE)"
        raise ContextLengthError(
            f"the request needs {needed}, but {limit}.", hint="shorten the text or lower max_new_tokens."
        )

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """Cancel a request: its slots are free before the next step. Unknown ids are ignored."""
        with self._lock:
            if request_id in self._sequences:
                self._cancelled.setdefault(request_id, reason)

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._sequences)

    @property
    def max_cache_bytes(self) -> int:
        """Memory of keys and values, in bytes, if texts of `max_length` are in all slots."""
        runner = self.runner
        caches = [runner.kv_cache, *([runner.encoder_cache.kv_cache] if runner.encoder_cache else [])]
        return self.max_length * sum(cache.bytes_per_position for cache in caches)

    @property
    def num_running(self) -> int:
        """Sequences that have a slot."""
        return len(self.scheduler.running)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a slot."""
        return self.scheduler.num_waiting

    def running_sequences(self) -> tuple[RunningSequence, ...]:
        """The sequences that have a slot, by slot."""
        with self._lock:
            return tuple(s.snapshot() for s in sorted(self.scheduler.running, key=lambda s: s.slot))

    def run(self, requests: Sequence[Request]) -> list[list[SequenceOutput]]:
        """Run requests to their end, in an engine that has no others.

        Returns:
            For each request, one `SequenceOutput` per sequence with all its tokens and text.

        Raises:
            RequestError: The engine has other requests.
            PrefixError: As `add`; then none of them is run.
        """
        if self.busy:
            raise RequestError(
                "the engine has other requests, whose outputs would be lost.",
                hint="call `step` until it is not busy, or `add` these requests as well.",
            )
        added: list[str] = []
        try:
            for request in requests:
                self.add(request)
                added.append(request.id)
        except PrefixError:
            for request_id in added:
                self.cancel(request_id)
            # At once: nobody may call `step` any more.
            self._end_cancelled()
            raise
        outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
        while self.busy:
            for output in self.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)
        return [[join_outputs(outputs[request.id, index]) for index in range(request.n)] for request in requests]

    def free(self) -> None:
        """Give the memory of the slots back; the engine computes nothing afterwards."""
        del self.runner

    # --- a step -------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def step(self) -> list[SequenceOutput]:
        """Compute one step; returns its outputs.

        A sequence whose prefix cannot be made readable, for which memory does not suffice or whose logits are not
        finite, ends with `error`; the others go on. If the model fails, all sequences of the step do.
        """
        outputs = self._end_cancelled()
        with self._lock:
            admitted = self.scheduler.admit()
        self._try_each(admitted, self.runner.load_prefix, outputs)
        if self._has_encoder:
            # Before it reads a source again, for a sequence that got its slot after others of its request.
            self._share_prompts()
        with self._lock:
            to_encode = self.scheduler.sequences_to_encode()
        self._try_each(to_encode, self.runner.encode, outputs)
        self._share_prompts()
        with self._lock:
            decodes, prefills = self.scheduler.schedule()
        decodes = self._try_each(decodes, self.runner.reserve, outputs)
        prefills = self._try_each(prefills, self.runner.reserve, outputs)
        self.batch_size = len(decodes) + len(prefills)
        scheduled = [*decodes, *prefills]
        if not scheduled:
            return outputs
        try:
            logits = self.runner.forward(decodes, prefills)
            sampled = [work.sequence for work in scheduled if work.needs_logits]
            tokens = sample(logits[: len(sampled)], sampled, self.backbone.eos_id) if sampled else []
            broken = _add_prompt_logprobs(logits[len(sampled) :], scheduled)
        except Exception as error:
            _log.exception("a step failed, and with it its sequences")
            return outputs + [self._fail(work.sequence, error) for work in scheduled]
        ended = [work.sequence for work in scheduled if work.is_last and not work.needs_logits]
        for work in scheduled:
            work.sequence.num_computed_tokens += work.num_tokens
        # Before the others of its request take its prompt over; and before one ends whose prompt they need.
        outputs += [self._finish(sequence, "error", error=NOT_FINITE) for sequence in broken]
        self._share_prompts()
        outputs += [self._finish(sequence, "length") for sequence in ended if sequence not in broken]
        pairs = zip(sampled, tokens, strict=True)
        return outputs + [self._append(sequence, token) for sequence, token in pairs if sequence not in broken]

    def _share_prompts(self) -> None:
        """Let sequences have what was computed of their prompt for another one of their request."""
        with self._lock:
            pairs = self.scheduler.shared_prompts()
        for sequence, computed in pairs:
            self.runner.share_prompt(sequence, computed)

    def _try_each(self, items: Sequence[S], action: Callable[[S], None], outputs: list[SequenceOutput]) -> list[S]:
        """Do something for each sequence; one for which it fails ends. Returns the others."""
        done = []
        for item in items:
            try:
                action(item)
                done.append(item)
            except Exception as error:
                outputs.append(self._fail(item if isinstance(item, TokenSequence) else item.sequence, error))
        return done

    def _append(self, sequence: TokenSequence, token: Token | str | RequestError) -> SequenceOutput:
        """Append a sampled token to its sequence, which ends if that fails, or if there is none, as `sample` says."""
        if isinstance(token, str):
            return self._finish(sequence, "error", error=token)
        try:
            if isinstance(token, RequestError):
                raise token
            return self._extend(sequence, token)
        except RequestError as error:
            return replace(self._finish(sequence, "error", error=error.message), refused=True)
        except Exception as error:
            return self._fail(sequence, error)

    def _extend(self, sequence: TokenSequence, token: Token) -> SequenceOutput:
        """As `_append`, but raises what fails."""
        text = sequence.detokenizer
        if token.id == self.backbone.eos_id or token.id in sequence.request.sampling.end_ids:
            return self._finish(sequence, "stop", (), text.finish())
        sequence.token_ids.append(token.id)
        piece = text.add(token.id)
        if text.stopped:
            return self._finish(sequence, "stop", (token,), piece)
        # A forced first token is no part of the text.
        if sequence.grammar is not None and not (token.id == sequence.forced_bos_id and sequence.num_new_tokens == 1):
            sequence.grammar.accept(token.id)
            if sequence.grammar.finished:
                return self._finish(sequence, "stop", (token,), piece + text.finish())
        if sequence.num_new_tokens >= sequence.request.sampling.max_new_tokens:
            return self._finish(sequence, "length", (token,), piece + text.finish())
        prompt_tokens = sequence.take_prompt_tokens()
        return SequenceOutput(sequence.request.id, sequence.index, (token,), piece, prompt_tokens=prompt_tokens)

    def _finish(
        self,
        sequence: TokenSequence,
        reason: FinishReason,
        tokens: tuple[Token, ...] = (),
        text: str = "",
        error: str = "",
    ) -> SequenceOutput:
        request_id = sequence.request.id
        self._clear(sequence)
        with self._lock:
            self._release(sequence, reason)
            if all(other.finish_reason for other in self._sequences.get(request_id, ())):
                self._sequences.pop(request_id, None)
                self._cancelled.pop(request_id, None)
        prompt_tokens = () if reason == "error" else sequence.take_prompt_tokens()
        return SequenceOutput(request_id, sequence.index, tokens, text, reason, error, prompt_tokens=prompt_tokens)

    def _fail(self, sequence: TokenSequence, error: Exception) -> SequenceOutput:
        return self._finish(sequence, "error", error=f"{type(error).__name__}: {error}")

    def _clear(self, sequence: TokenSequence) -> None:
        """Leave nothing of a sequence in its slot."""
        if sequence.slot >= 0:
            self.runner.clear(sequence)

    def _release(self, sequence: TokenSequence, reason: FinishReason) -> None:
        """Mark a sequence as ended and free its slot, which is cleared; the lock is held."""
        sequence.finish_reason = reason
        self.scheduler.release(sequence)

    def _end_cancelled(self) -> list[SequenceOutput]:
        """End the sequences of cancelled requests."""
        with self._lock:
            cancelled = dict(self._cancelled)
            sequences = [s for name in cancelled for s in self._sequences[name] if s.finish_reason is None]
        for sequence in sequences:
            self._clear(sequence)
        with self._lock:
            for sequence in sequences:
                self._release(sequence, cancelled[sequence.request.id])
            # Their ids are in use until here.
            for request_id in cancelled:
                del self._sequences[request_id], self._cancelled[request_id]
        return [SequenceOutput(s.request.id, s.index, (), "", cancelled[s.request.id]) for s in sequences]


def _add_prompt_logprobs(logits: Float[Tensor, "R V"], scheduled: Sequence[ScheduledSequence]) -> list[TokenSequence]:
    """Add the log-probabilities that a step computed of prompts to their sequences; returns those where one is NaN."""
    row, broken = 0, []
    for work in scheduled:
        if count := work.num_prompt_logits:
            sequence, first = work.sequence, work.sequence.num_computed_tokens + 1
            next_ids = sequence.token_ids[first : first + count]
            num_top = sequence.request.sampling.prompt_logprobs or 0
            found = prompt_logprobs(logits[row : row + count], next_ids, num_top)
            tokens = [Token(id, *values) for id, values in zip(next_ids, found, strict=True)]
            sequence.prompt_tokens += tokens
            if any(token.logprob != token.logprob for token in tokens):
                broken.append(sequence)
            row += count
    return broken


def _check_experts(backbone: Backbone, num_slots: int) -> None:
    """Refuse more texts at once than tokens of a row go to one expert: a step computes a token of each in one row."""
    if not backbone.counts_by_row:
        return
    capacities = [getattr(module, "expert_capacity", None) for module in backbone.model.modules()]
    most = min((capacity for capacity in capacities if isinstance(capacity, int)), default=num_slots)
    if num_slots > most:
        raise ConfigError(
            f"num_slots is {num_slots}, but the experts of {backbone.name!r} take {most} tokens of a row (its "
            "expert_capacity), so that more texts would change one another.",
            hint=f"set num_slots to {most} or less.",
        )


def _check_generates(backbone: Backbone) -> None:
    """Refuse a model that the engine cannot run."""
    if backbone.kind == "encoder":
        raise BackboneError(
            f"{backbone.name!r} is an encoder, which reads text and writes none.",
            hint="use it for classification or tagging, or choose a model that generates.",
        )
    if not backbone.layout.packable:
        raise BackboneError(
            f"{backbone.name!r} (kind {backbone.kind}) cannot compute several texts in one row.",
            hint="use `generate`, which batches whole requests.",
        )
    if backbone.layout.repeats:
        raise BackboneError(
            f"{backbone.name!r} runs a layer several times in one pass, for which a slot has no room.",
            hint="use `generate`, which batches whole requests.",
        )
    # A GPU is named by its number or its device; what the CPU or the disk keeps runs on the GPU, too.
    parts = getattr(backbone.model, "hf_device_map", {}).values()
    devices = {str(part).rpartition(":")[2] for part in parts} - {"cpu", "disk"}
    if len(devices) > 1:
        raise BackboneError(
            f"{backbone.name!r} is on {len(devices)} devices, but the slots are on one.",
            hint="use `generate`, or load the model on one device.",
        )
