"""The engine's part of a request: submit its prompts, stream or collect the outputs, cancel what still runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.data.chat import special_stops
from prefixtune.data.labels import labels_of
from prefixtune.engine.base import Engine
from prefixtune.engine.request import (
    ContextLengthError,
    EngineFull,
    Request,
    SamplingParams,
    SequenceOutput,
    join_outputs,
)
from prefixtune.errors import PrefixError
from prefixtune.sampling.grammar import Grammar
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.streaming import run_until_disconnect
from prefixtune.server.metrics import Metrics
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.responses import ApiError, bad_request, too_many_requests, unavailable

__all__ = [
    "Generation",
    "collect_outputs",
    "deadline_exceeded",
    "engine_error",
    "start_generation",
    "stream_outputs",
]


KEEP_ALIVE_SECONDS = 15.0
"""Seconds without an output after which a stream says that it is alive."""
_PARAMS = {"min_new_tokens": "min_tokens", "prompt_logprobs": "echo"}
"""Sampling parameters -> their names in requests, where they differ."""
_MOST_LOGPROBS = 200_000
"""Log-probabilities of a response: some 5 MB, and one to four seconds of a thread."""


@dataclass(eq=False)
class _Progress:
    """How far one text is: its tokens, and when the last one came."""

    tokens: int = 0
    last_token_at: float = 0.0


@dataclass(eq=False)
class Generation:
    """The engine's requests of one HTTP request. The engine works in its own thread; outputs arrive in the event loop.

    Attributes:
        worker: The engine.
        requests: One for each prompt, all with the same n.
        model: The requested model.
        deadline: Seconds that they may take.
        metrics: Where times and tokens are counted.
        first_token_seconds: Time to the first token of all; None: there is none yet.
        num_tokens: Tokens generated so far.
    """

    worker: Engine
    requests: Sequence[Request]
    model: ServedModel
    deadline: float
    metrics: Metrics
    first_token_seconds: float | None = field(default=None, init=False)
    num_tokens: int = field(default=0, init=False)
    _started: float = field(default_factory=time.monotonic, init=False)
    _outputs: asyncio.Queue[SequenceOutput] = field(default_factory=asyncio.Queue, init=False)
    _running: dict[int, _Progress] = field(default_factory=dict, init=False)
    _first_indices: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self._first_indices = {request.id: position * request.n for position, request in enumerate(self.requests)}

    @property
    def num_texts(self) -> int:
        """How many texts are generated."""
        return sum(request.n for request in self.requests)

    @property
    def running(self) -> bool:
        """Whether a text has not ended yet."""
        return bool(self._running)

    def text_index(self, output: SequenceOutput) -> int:
        """Index of the output's text, counted through all prompts."""
        return self._first_indices[output.request_id] + output.index

    def submit(self) -> None:
        """Submit the requests to the engine; `cancel` must follow in any case.

        Raises:
            PrefixError: The engine refuses one.
        """
        loop = asyncio.get_running_loop()

        def receive(output: SequenceOutput) -> None:
            # The loop may be gone when the server had to stop at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._outputs.put_nowait, output)

        for request in self.requests:
            self.worker.submit(request, receive, deadline=self.deadline)
            self._running |= {index: _Progress() for index in self._indices(request)}

    def _indices(self, request: Request) -> range:
        first = self._first_indices[request.id]
        return range(first, first + request.n)

    def cancel(self) -> None:
        """Cancel what still runs; does nothing when all texts have ended."""
        for request in self.requests:
            if any(index in self._running for index in self._indices(request)):
                self.worker.cancel(request.id)
        for progress in self._running.values():
            self.metrics.text_done(self.model.names, "gone", progress.tokens)
        self._running.clear()

    async def next_output(self) -> SequenceOutput | None:
        """The next output; None if there was none for some seconds."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                output = await self._outputs.get()
        except TimeoutError:
            return None
        self._measure(output)
        return output

    def _measure(self, output: SequenceOutput) -> None:
        index, now = self.text_index(output), time.monotonic()
        progress = self._running[index]
        if output.tokens:
            if progress.tokens:
                self.metrics.next_token(now - progress.last_token_at)
            else:
                self.metrics.first_token(now - self._started)
                self.first_token_seconds = self.first_token_seconds or now - self._started
            progress.last_token_at = now
            progress.tokens += len(output.tokens)
            self.num_tokens += len(output.tokens)
        if output.finish_reason is not None:
            self.metrics.text_done(self.model.names, output.finish_reason, progress.tokens)
            del self._running[index]

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated; the prefix is not counted."""
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt_tokens + self.num_tokens,
        }


def start_generation(
    context: RequestContext,
    model: ServedModel,
    prompts: Sequence[tuple[int, ...]],
    sampling: SamplingParams,
    *,
    n: int = 1,
    default_max_tokens: int | None,
    verbatim: bool,
    grammar: Grammar | None = None,
) -> Generation:
    """Submit the prompts to the engine; what still runs when the response ends is cancelled.

    Args:
        context: The HTTP request.
        model: With which prefix.
        prompts: Token ids.
        sampling: How tokens are chosen.
        n: Texts for each prompt.
        default_max_tokens: Most new tokens instead of those of `sampling`, as far as they fit; None: the request says.
        verbatim: Keep the white space around the texts.
        grammar: What the texts must follow.

    Raises:
        ApiError: A prompt is too long, something is asked for that the model does not have, or the engine takes no
            request now.
    """
    state = context.state
    if labels_of(model.prefix) is not None:
        message = f"the prefix {model.name!r} gives labels and writes no text."
        raise bad_request(message, "model", "not_a_generator", hint="use /classify.")
    _check_supported(state.worker, prompts, sampling)
    context.log_fields |= {"model": model.name, "prompt_tokens": sum(map(len, prompts))}
    if special := special_stops(state.backbone, sampling.stop):
        sampling = sampling.replace(end_ids=(*sampling.end_ids, *special))
    requests = [
        Request(
            prompt,
            model.prefix,
            _fit_sampling(context, sampling, model, len(prompt), default_max_tokens),
            n=n,
            tenant=context.caller.name,
            prefix_name=model.name,
            verbatim=verbatim,
            grammar=grammar,
            id=uuid.uuid4().hex,
        )
        for prompt in prompts
    ]
    _check_logprobs(requests)
    try:
        # Before the queue: what can never fit must not be answered with "try again later".
        for one in requests:
            state.worker.check_length(len(one.prompt), one.prefix_length, one.sampling.max_new_tokens)
    except ContextLengthError as error:
        fewer = ", or join fewer prefixes" if model.parts else ""
        hint = f"shorten the prompt or lower max_tokens{fewer}."
        raise bad_request(error.message, "prompt", "context_length_exceeded", hint=hint) from None
    generation = Generation(state.worker, requests, model, context.remaining, state.metrics)
    context.exit_stack.callback(_finish, context, generation)
    try:
        generation.submit()
    except EngineFull as error:
        if state.draining or not state.worker.healthy:
            raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
        raise too_many_requests(error.message, "queue_full", 1.0) from None
    except PrefixError as error:
        raise bad_request(error.message, hint=error.hint) from None
    for prompt in prompts:
        state.metrics.prompt(model.names, len(prompt))
    return generation


def _check_supported(engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams) -> None:
    """Refuse what the engine or the model does not have: parameters, tokens, an encoder prompt's log-probabilities."""
    for name, nothing in engine.lacks.items():
        if getattr(sampling, name) != nothing:
            param = _PARAMS.get(name, name)
            raise bad_request(f"this server's engine has no {param}.", param, "unsupported_field", hint="leave it out.")
    for param, tokens in (("prompt", itertools.chain(*prompts)), ("logit_bias", iter(sampling.logit_bias))):
        for token in tokens:
            if not 0 <= token < engine.vocab_size:
                message = f"there is no token {token}: the model has {engine.vocab_size:,}."
                raise bad_request(message, param, hint="use the ids of the backbone's own tokenizer.")
    if sampling.prompt_logprobs is not None and engine.backbone.kind == "encoder-decoder":
        message = "the model's encoder reads the prompt, whose tokens then have no log-probabilities."
        raise bad_request(message, "echo", hint="leave out echo or logprobs.")


def _check_logprobs(requests: Sequence[Request]) -> None:
    """Refuse a request whose response would be too large by its log-probabilities."""
    num_logprobs = 0
    for one in requests:
        sampling = one.sampling
        if sampling.prompt_logprobs is not None:
            num_logprobs += one.n * len(one.prompt) * (sampling.prompt_logprobs + 1)
        if sampling.logprobs is not None:
            num_logprobs += one.n * sampling.max_new_tokens * (sampling.logprobs + 1)
    if num_logprobs > _MOST_LOGPROBS:
        raise bad_request(
            f"the response would have {num_logprobs:,} log-probabilities; at most {_MOST_LOGPROBS:,} are allowed.",
            "logprobs",
            "too_many_logprobs",
            hint="ask for fewer, or lower n or max_tokens.",
        )


def _finish(context: RequestContext, generation: Generation) -> None:
    generation.cancel()
    context.log_fields["completion_tokens"] = generation.num_tokens
    if generation.first_token_seconds is not None:
        context.log_fields["first_token_seconds"] = round(generation.first_token_seconds, 4)


def _fit_sampling(
    context: RequestContext, sampling: SamplingParams, model: ServedModel, prompt_tokens: int, default: int | None
) -> SamplingParams:
    """The request's sampling; a default length is lowered to what fits."""
    limit = context.state.config.max_prompt_tokens
    if not prompt_tokens:
        raise bad_request("the prompt has no token; some text is needed.", "prompt")
    if limit and prompt_tokens > limit:
        raise bad_request(
            f"the prompt has {prompt_tokens} tokens, but {limit} are allowed.", "prompt", "context_length_exceeded"
        )
    if default is None:
        return sampling
    fitting = min(default, context.state.worker.available_tokens(prompt_tokens, model.prefix_length))
    return sampling.replace(max_new_tokens=max(1, sampling.min_new_tokens, fitting))


async def stream_outputs(context: RequestContext, generation: Generation) -> AsyncGenerator[SequenceOutput | None]:
    """The outputs of all texts until the last one has ended; None if there was none for some seconds.

    Raises:
        ApiError: A text could not be generated.
    """
    while generation.running:
        output = await generation.next_output()
        if output is not None and output.finish_reason not in (None, "stop", "length"):
            raise _failure(context, output)
        yield output


async def collect_outputs(context: RequestContext, generation: Generation) -> list[SequenceOutput]:
    """One whole output for each text, in order.

    Raises:
        ApiError: A text could not be generated.
        ClientDisconnect: The client disconnected.
    """

    async def collect() -> list[SequenceOutput]:
        pieces: list[list[SequenceOutput]] = [[] for _ in range(generation.num_texts)]
        async for output in stream_outputs(context, generation):
            if output is not None:
                pieces[generation.text_index(output)].append(output)
        return [join_outputs(outputs) for outputs in pieces]

    return await run_until_disconnect(context.request.receive, collect())


def _failure(context: RequestContext, output: SequenceOutput) -> ApiError:
    """Why a text was not generated."""
    context.log_fields["finished"] = output.finish_reason
    if output.finish_reason == "timeout":
        return deadline_exceeded(context)
    if output.finish_reason == "cancelled":
        return unavailable("the server is shutting down; the request was cancelled.", "draining", retry_after=5)
    if output.refused:
        hint = "use a simpler schema, with fewer optional properties or alternatives."
        return bad_request(output.error, "response_format", "invalid_schema", hint=hint)
    failure = engine_error(context, output.error)
    if output.engine_crashed:
        return unavailable(
            "the engine failed and the server stops; send the request again later.", "engine_failed", retry_after=1
        )
    return failure


def engine_error(context: RequestContext, reason: str) -> ApiError:
    """500: the model failed on the request. Its own words are for the log only."""
    context.log_fields["engine_error"] = reason[:500]
    message = f"the engine failed on this request; the log has more on request {context.log_fields['id']}."
    return ApiError(500, message, code="engine_error")


def deadline_exceeded(context: RequestContext) -> ApiError:
    """504: the request's time is over."""
    message = f"the request was not done within {context.state.config.deadline:g} seconds."
    # A retry, by a client or by a load balancer, would take as long.
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})
