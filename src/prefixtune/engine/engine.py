"""The engine: requests in, pieces of text out, one step of the model at a time.

Every step computes the next token of all running sequences, and pieces of new prompts, in one forward pass over one
row. Requests join and leave between steps; each has its own prefix, or none. An encoder-decoder reads a request's
prompt with its encoder when the request gets a slot. Sequences of one request share what was computed of its prompt.

    engine = TorchEngine(backbone)
    engine.add(Request(prompt, prefix))
    while engine.busy:
        for output in engine.step():
            print(output.text)

Who calls `submit` instead gets outputs through a callback: the engine then computes steps in a thread of its own, and
nobody else may call `step`. All else may be called from any thread. Only a step touches keys and values.

Memory for keys and values is taken once, at the start. A request waits until there is room for all that it may need;
one that never fits is refused. So no step runs out of it.

If the engine itself fails, all requests end with `error`, and it accepts no more. `prefixtune serve` then exits, so
that a supervisor can start it again.

In float32 a greedy text is the same alone and in any mix, token for token. In bfloat16, sums round differently when a
product has other rows as well, which may decide a close choice between two tokens differently.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import BackboneLike, as_backbone
from prefixtune.engine import base
from prefixtune.engine.base import Receive, RunningSequence, Snapshot
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.model_runner import ModelRunner
from prefixtune.engine.request import EngineFull, FinishReason, Request, SequenceOutput, Token, join_outputs
from prefixtune.engine.sampler import NOT_FINITE, logprobs_of, sample
from prefixtune.engine.scheduler import ScheduledSequence, Scheduler
from prefixtune.engine.sequence import TokenSequence
from prefixtune.errors import BackboneError, ContextLengthError, PrefixError, RequestError

DEFAULT_MAX_LENGTH = 4096
"""Positions of a slot if the backbone has no limit."""
_PROMPT_LOGITS_BYTES = 2**27
"""Of the logits (as float32) of prompts whose log-probabilities are wanted, in one step."""
_CPU_PREFILL_TOKENS, _GPU_PREFILL_TOKENS = 256, 2048
"""Of prompts in a step, by default."""

_log = logging.getLogger(__name__)
R = TypeVar("R")


@dataclass(eq=False)
class _Entry:
    """A request that has not ended.

    Attributes:
        sequences: Its texts.
        open: Which of them have not told that they have ended.
        receive: Takes its outputs; None: `step` returns them.
        deadline: When it must be done, by the monotonic clock.
        cancelled: Why it ends before the next step; None: it goes on.
    """

    sequences: Sequence[TokenSequence]
    open: set[int]
    receive: Receive | None
    deadline: float
    cancelled: FinishReason | None = None


class TorchEngine(base.Engine):
    """Continuous batching over one frozen model, decoder-only or encoder-decoder.

    Args:
        backbone: The model: a `Backbone`, a name or path, or a (model, tokenizer) pair.
        config: An `EngineConfig` or a dict.
        **options: Fields of `EngineConfig`, instead of `config`.

    Attributes:
        name: `torch`.
        backbone: The model that runs.
        max_length: Most positions of a text (see `EngineConfig`); no more than memory has room for.
        prefill_tokens: Most prompt tokens of a step beside running texts.
        batch_size: Sequences of which the last step computed something.

    Raises:
        BackboneError: The model generates no text, cannot compute several texts in one row, or is on several devices.
        ConfigError: A wrong option, something that is no backbone, or no memory for keys and values.
    """

    def __init__(
        self, backbone: BackboneLike, config: EngineConfig | Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        self.name, self.config = "torch", EngineConfig.from_arguments(config, options)
        backbone = as_backbone(backbone)
        _check_generates(backbone)
        self.backbone = backbone
        # Beyond a LongRoPE limit a text would turn the keys of all others in its row.
        limits = (self.config.max_length, backbone.max_positions, backbone.longrope_limit)
        wanted = min((limit for limit in limits if limit), default=DEFAULT_MAX_LENGTH)
        cache_bytes = self.config.kv_cache_mib * 2**20
        self.runner = ModelRunner(backbone, self.config.num_slots, wanted, cache_bytes)
        self.max_length = min(wanted, *(cache.num_positions for cache in self.runner.caches))
        if self.max_length < wanted:
            self.remedy = "shorten the text, lower max_new_tokens, or raise kv_cache_mib."
        # The encoder reads the prompt.
        self.lacks = ("prompt_logprobs",) if self.runner.has_encoder else ()
        max_prompt_logits = max(1, _PROMPT_LOGITS_BYTES // (4 * backbone.num_embeddings))
        on_cpu = backbone.device.type == "cpu"
        self.prefill_tokens = self.config.prefill_tokens or (_CPU_PREFILL_TOKENS if on_cpu else _GPU_PREFILL_TOKENS)
        self.scheduler = Scheduler(self.config.num_slots, self.prefill_tokens, max_prompt_logits)
        self.batch_size = 0
        self._entries: dict[str, _Entry] = {}
        self._calls: deque[tuple[Future[Any], Callable[[Backbone], Any]]] = deque()
        self._steps = self._texts = self._tokens = 0
        self._closing = False
        # Guards the requests and calls.
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    # --- requests -----------------------------------------------------------------------------------------------------

    def add(self, request: Request, receive: Receive | None = None, deadline: float | None = None) -> None:
        """Queue a request for the next step.

        Args:
            request: The request.
            receive: Called with its outputs; None: `step` returns them.
            deadline: Seconds from now until it must be done; None: it has no end.

        Raises:
            ContextLengthError: It needs more positions than the model has, or more than memory has room for.
            RequestError: It has tokens that the model does not have, or its id is in use.
            BackboneError: Its prefix does not fit the backbone, or was trained for other weights.
            EngineFull: The engine is closed or has failed.
        """
        self.check(request)
        with self._changed:
            self._check_accepting()
            if request.id in self._entries:
                raise RequestError(f"a request {request.id!r} is running already.", hint="give each its own id.")
            first = (self.backbone.decoder_start_id, self.backbone.forced_bos_id) if self.runner.has_encoder else ()
            detokenizers = [request.detokenizer(self.backbone) for _ in range(request.n)]
            sequences = [TokenSequence(request, index, one, *first) for index, one in enumerate(detokenizers)]
            end = math.inf if deadline is None else time.monotonic() + deadline
            self._entries[request.id] = _Entry(sequences, set(range(request.n)), receive, end)
            self.scheduler.add(sequences)
            self._changed.notify_all()

    def submit(self, request: Request, receive: Receive, deadline: float | None = None) -> None:
        """Submit a request to the engine's thread (see `base.Engine`)."""
        self.add(request, receive, deadline)
        self._start()

    def submit_all(self, requests: Iterable[Request], receive: Receive) -> None:
        """Submit several requests (see `base.Engine`); so equal requests make equal steps, whatever the threads do."""
        with self._changed:
            for request in requests:
                self.add(request, receive)
        self._start()

    def call(self, work: Callable[[Backbone], R]) -> Future[R]:
        """Let the model do something else between two steps; the running texts wait meanwhile, so it should be short.

        Args:
            work: Called with the engine's backbone, in the engine's thread. Of several, one is called before each step.

        Raises:
            EngineFull: The engine is closed or has failed.
        """
        future: Future[R] = Future()
        with self._changed:
            self._check_accepting()
            self._calls.append((future, work))
            self._changed.notify_all()
        self._start()
        return future

    def _check_accepting(self) -> None:
        """Refuse work that would never be done; the lock is held."""
        if self.failed or self._closing:
            why = "has failed" if self.failed else "is being closed"
            raise EngineFull(f"the engine {why} and accepts no more requests.", hint="start it again.")

    def check(self, request: Request) -> None:
        """Refuse what the engine cannot run; in a step, it could fail other requests.

        Raises:
            PrefixError: As `add`.
        """
        if not isinstance(request, Request):
            raise RequestError(f"{type(request).__name__} is no request.", hint="pass a `prefixtune.Request`.")
        super().check(request)
        for needed, cache in zip(self.runner.positions(request), self.runner.caches, strict=True):
            if needed > cache.num_positions:
                what = f"the request needs {needed:,} positions, but memory has room for {cache.num_positions:,}."
                raise ContextLengthError(what, hint="shorten the text or its prefix, or raise kv_cache_mib.")

    def cancel(self, request_id: str, reason: FinishReason = "cancelled") -> None:
        """Cancel a request: its slots are free before the next step. Unknown ids are ignored."""
        with self._changed:
            if entry := self._entries.get(request_id):
                entry.cancelled = entry.cancelled or reason
                self._changed.notify_all()

    def close(self) -> None:
        """Cancel what still runs, and stop (see `base.Engine`)."""
        with self._changed:
            self._closing = True
            self._refuse_calls("the engine is being closed.")
            for entry in self._entries.values():
                entry.cancelled = entry.cancelled or "cancelled"
            self._changed.notify_all()
        if self._thread not in (None, threading.current_thread()):
            self._thread.join(base.CLOSE_SECONDS)

    @property
    def healthy(self) -> bool:
        """Whether requests are computed: the engine is not closed, has not failed, and its thread has not ended."""
        return not (self.failed or self._closing) and (self._thread is None or self._thread.is_alive())

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._entries)

    @property
    def num_unfinished(self) -> int:
        """Requests that have not ended."""
        return len(self._entries)

    def snapshot(self) -> Snapshot:
        """What the engine is doing now, and its counters."""
        with self._changed:
            slots = sorted(self.scheduler.running, key=lambda s: s.slot)
            running = tuple(RunningSequence(s.slot, s.request, s.num_new_tokens) for s in slots)
            waiting = len(self.scheduler.waiting)
            return Snapshot(running, waiting, steps=self._steps, texts=self._texts, tokens=self._tokens)

    def run(self, requests: Sequence[Request]) -> list[list[SequenceOutput]]:
        """Run requests to their end, in an engine that has no others.

        Returns:
            For each request, one `SequenceOutput` per sequence with all its tokens and text.

        Raises:
            RequestError: The engine has other requests.
            PrefixError: As `add`; then none of them is run, unless two have one id.
        """
        if self.busy:
            what = "the engine has other requests, whose outputs would be lost."
            raise RequestError(what, hint="call `step` until it is not busy, or `add` these requests as well.")
        for request in requests:
            self.check(request)
        for request in requests:
            self.add(request)
        outputs: dict[tuple[str, int], list[SequenceOutput]] = {}
        while self.busy:
            for output in self.step():
                outputs.setdefault((output.request_id, output.index), []).append(output)
        return [[join_outputs(outputs[request.id, index]) for index in range(request.n)] for request in requests]

    # --- a step -------------------------------------------------------------------------------------------------------

    def step(self) -> list[SequenceOutput]:
        """Compute one step; returns the outputs of requests that were added and not submitted.

        A text whose logits are not finite ends with `error`, and the others go on. If the model fails, all running
        texts end so.

        Raises:
            Exception: The model has failed on a GPU, whose state is unknown then: no later step would work.
        """
        return self._deliver(self._step())

    @torch.inference_mode()
    def _step(self) -> list[SequenceOutput]:
        """A step; requests that end with it still have their entries."""
        outputs = self._end_cancelled()
        with self._changed:
            admitted = self.scheduler.admit(self.runner.take_room)
        try:
            self._compute(admitted, outputs)
        except Exception as error:
            if self.backbone.device.type != "cpu" and not isinstance(error, torch.OutOfMemoryError):
                raise
            _log.exception("a step failed, and with it the running texts")
            reason = f"{type(error).__name__}: {error}"
            outputs += [self._finish(s, "error", error=reason) for s in list(self.scheduler.running)]
        self._steps += bool(self.batch_size)
        self._texts += self.batch_size
        return outputs

    def _compute(self, admitted: Sequence[TokenSequence], outputs: list[SequenceOutput]) -> None:
        """What the model does in a step; `outputs` has what became certain, if it fails."""
        for sequence in admitted:
            sequence.grammar = sequence.request.grammar and sequence.request.grammar.start()
            self.runner.load_prefix(sequence)
        # For those that got their slots after others of their request.
        self._share_prompts()
        for sequence in self.scheduler.sequences_to_encode():
            self.runner.encode(sequence)
        scheduled = self.scheduler.schedule()
        self.batch_size = len(scheduled)
        if not scheduled:
            return
        logits = self.runner.forward(scheduled)
        sampled = [work.sequence for work in scheduled if work.needs_logits]
        tokens = sample(logits[: len(sampled)], sampled, self.backbone.eos_id) if sampled else []
        broken = _add_prompt_logprobs(logits[len(sampled) :], scheduled)
        ended = [work.sequence for work in scheduled if work.is_last and not work.needs_logits]
        for work in scheduled:
            work.sequence.num_computed_tokens += work.num_tokens
        # Before the others of its request take its prompt over; and before one ends whose prompt they need.
        outputs += [self._finish(sequence, "error", error=NOT_FINITE) for sequence in broken]
        self._share_prompts()
        outputs += [self._finish(sequence, "length") for sequence in ended if sequence not in broken]
        for sequence, token in zip(sampled, tokens, strict=True):
            if sequence not in broken:
                outputs.append(self._append(sequence, token))

    def _share_prompts(self) -> None:
        """Let sequences have what was computed of their prompt for another one of their request."""
        for sequence, computed in self.scheduler.shared_prompts():
            self.runner.share_prompt(sequence, computed)

    def _append(self, sequence: TokenSequence, token: Token | PrefixError) -> SequenceOutput:
        """Append a sampled token to its sequence, which ends if that fails, or if `sample` found none."""
        try:
            if isinstance(token, PrefixError):
                raise token
            return self._extend(sequence, token)
        except Exception as error:
            reason = error.message if isinstance(error, PrefixError) else f"{type(error).__name__}: {error}"
            return self._finish(sequence, "error", error=reason, refused=isinstance(error, RequestError))

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
        self, sequence: TokenSequence, reason: FinishReason, tokens: tuple[Token, ...] = (), text: str = "", **why: Any
    ) -> SequenceOutput:
        """End a sequence: its room, its slot and, with the last one of a request, the request's id are free."""
        request_id = sequence.request.id
        # Without the lock, for which callers wait: wiping can take a while.
        self.runner.give_room_back(sequence)
        with self._changed:
            sequence.finish_reason = reason
            self.scheduler.release(sequence)
        prompt_tokens = sequence.take_prompt_tokens() if reason in ("stop", "length") else ()
        return SequenceOutput(request_id, sequence.index, tokens, text, reason, prompt_tokens=prompt_tokens, **why)

    def _end_cancelled(self) -> list[SequenceOutput]:
        """End the sequences of cancelled requests, and of those whose deadline has passed."""
        now = time.monotonic()
        with self._changed:
            ended = [
                (sequence, entry.cancelled or "timeout")
                for entry in self._entries.values()
                if entry.cancelled or entry.deadline <= now
                for sequence in entry.sequences
                if sequence.finish_reason is None
            ]
        return [self._finish(sequence, reason) for sequence, reason in ended]

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def _start(self) -> None:
        with self._changed:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="prefixtune-engine", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        try:
            if self.backbone.device.type == "cuda":
                # The current device is a thread's own.
                torch.cuda.set_device(self.backbone.device)
            while self._wait_for_work():
                self._do_call()
                if self.busy:
                    self.step()
        except BaseException as error:
            _log.exception("the engine failed")
            self._fail(f"the engine failed ({type(error).__name__}).")

    def _wait_for_work(self) -> bool:
        """Wait until there is something to compute; False: the thread ends."""
        with self._changed:
            while not (self.busy or self._calls):
                if self._closing:
                    return False
                self._changed.wait()
            return True

    def _do_call(self) -> None:
        """Do the first of the waiting calls, if there is one."""
        with self._changed:
            if not self._calls:
                return
            future, work = self._calls.popleft()
        if not future.set_running_or_notify_cancel():
            return
        try:
            result = work(self.backbone)
        except BaseException as error:
            future.set_exception(error)
            # As in a step: a GPU that failed computes nothing more.
            if self.backbone.device.type != "cpu" and not isinstance(error, PrefixError | torch.OutOfMemoryError):
                raise
        else:
            future.set_result(result)

    def _refuse_calls(self, why: str) -> None:
        """End the waiting calls; the lock is held."""
        for future, _ in self._calls:
            if future.set_running_or_notify_cancel():
                future.set_exception(EngineFull(why, hint="use another replica."))
        self._calls.clear()

    def _deliver(self, outputs: Sequence[SequenceOutput]) -> list[SequenceOutput]:
        """Count outputs, and give them to who submitted their requests; the others are returned."""
        with self._changed:
            found = [(self._entries[output.request_id], output) for output in outputs]
            for entry, output in found:
                self._tokens += len(output.tokens)
                if output.finish_reason is not None:
                    entry.open.discard(output.index)
                    if not entry.open:
                        del self._entries[output.request_id]
        for entry, output in found:
            if entry.receive is not None:
                self._give(entry, output)
        return [output for entry, output in found if entry.receive is None]

    def _fail(self, why: str) -> None:
        """End all requests, and accept no more."""
        with self._changed:
            self.failed = True
            self._refuse_calls(why)
            texts = [(name, index) for name, entry in self._entries.items() for index in sorted(entry.open)]
        self._deliver([SequenceOutput(name, index, (), "", "error", why, engine_crashed=True) for name, index in texts])
        self.on_failure()


def _add_prompt_logprobs(logits: Float[Tensor, "R V"], scheduled: Sequence[ScheduledSequence]) -> list[TokenSequence]:
    """Add the log-probabilities that a step computed of prompts to their sequences; returns those where one is NaN."""
    row, broken = 0, []
    for work in scheduled:
        if count := work.num_prompt_logits:
            sequence, first = work.sequence, work.sequence.num_computed_tokens + 1
            next_ids = sequence.token_ids[first : first + count]
            num_top = sequence.request.sampling.prompt_logprobs or 0
            found = logprobs_of(logits[row : row + count], next_ids, num_top)
            tokens = [Token(id, *values) for id, values in zip(next_ids, found, strict=True)]
            sequence.prompt_tokens += tokens
            if any(token.logprob != token.logprob for token in tokens):
                broken.append(sequence)
            row += count
    return broken


def _check_generates(backbone: Backbone) -> None:
    """Refuse a model that the engine cannot run."""
    # A GPU is named by its number or its device; what the CPU or the disk keeps runs on the GPU, too.
    parts = getattr(backbone.model, "hf_device_map", {}).values()
    devices = {str(part).rpartition(":")[2] for part in parts} - {"cpu", "disk"}
    for is_so, why in (
        (backbone.kind == "encoder", "is an encoder, which reads text and writes none"),
        (not backbone.layout.packable, "cannot compute several texts in one row"),
        (backbone.counts_by_row, "has experts that take only so many tokens of a row, for which texts would compete"),
        (backbone.layout.repeats, "runs a layer several times in one pass, for which a text's keys have no room"),
        (len(devices) > 1, f"is on {len(devices)} devices, but keys and values are on one"),
    ):
        if is_so:
            raise BackboneError(f"{backbone.name!r} {why}.", hint="use `generate`; an encoder only labels.")
