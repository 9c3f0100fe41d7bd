"""The engine's part of a request: submit its prompts, stream or collect the outputs, cancel what still runs."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from typing import Any

from fastapi.concurrency import run_in_threadpool

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
from prefixtune.sampling.grammar import Grammar
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.streaming import deadline_exceeded, run_in_time
from prefixtune.server.catalog import ServedModel
from prefixtune.server.responses import ApiError, bad_request, too_many_requests, unavailable

KEEP_ALIVE_SECONDS = 15.0
"""Seconds without an output after which a stream says that it is alive."""
_GRACE_SECONDS = 10.0
"""The engine ends what is too late, at the end of its step."""
_PARAMS = {"min_new_tokens": "min_tokens", "prompt_logprobs": "echo"}
"""Sampling parameters -> their names in requests, where they differ."""
_MOST_LOGPROBS = 200_000
"""Log-probabilities of a response: some 5 MB, and one to four seconds of a thread."""


class Generation:
    """The texts of one HTTP request. The engine works in threads of its own; outputs arrive in the event loop.

    A text has an index, counted through all prompts.

    Args:
        context: The HTTP request.
        model: The requested model.
        requests: One for each prompt, all with the same n.

    Attributes:
        num_tokens: Tokens generated so far.
    """

    def __init__(self, context: RequestContext, model: ServedModel, requests: Sequence[Request]) -> None:
        self.context, self.model, self.requests = context, model, requests
        self.num_texts, self.num_tokens = sum(request.n for request in requests), 0
        self._started = time.monotonic()
        self._outputs = asyncio.Queue[tuple[int, SequenceOutput]]()
        # How many tokens each text that runs has, and when the last one came.
        self._running: dict[int, tuple[int, float]] = {}

    async def submit(self) -> None:
        """Submit the requests to the engine; what still runs when the response ends is cancelled.

        Raises:
            PrefixError: The engine refuses one.
        """
        loop = asyncio.get_running_loop()

        def receive(first: int, output: SequenceOutput) -> None:
            # The loop may be gone when the server had to stop at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._outputs.put_nowait, (first + output.index, output))

        def submit() -> None:
            for position, request in enumerate(self.requests):
                first = position * request.n
                self.context.state.worker.submit(request, partial(receive, first), deadline=self.context.remaining)
                self._running |= {first + index: (0, self._started) for index in range(request.n)}

        self.context.exit_stack.callback(self._end)
        # Some engines write the prefix's file first.
        await run_in_threadpool(submit)

    def _end(self) -> None:
        for position, request in enumerate(self.requests):
            if any(index // request.n == position for index in self._running):
                self.context.state.worker.cancel(request.id)
        for tokens, _ in self._running.values():
            self.context.state.metrics.text_done(self.model.names, "gone", tokens)
        self._running.clear()
        self.context.log_fields["completion_tokens"] = self.num_tokens

    async def outputs(self) -> AsyncGenerator[tuple[int, SequenceOutput] | None]:
        """The outputs of all texts, each with its text's index; None if there was none for some seconds.

        Raises:
            ApiError: A text could not be generated.
        """
        while self._running:
            try:
                async with asyncio.timeout(KEEP_ALIVE_SECONDS):
                    index, output = await self._outputs.get()
            except TimeoutError:
                yield None
                continue
            self._measure(index, output)
            if output.finish_reason not in (None, "stop", "length"):
                raise _failure(self.context, output)
            yield index, output

    async def collect(self) -> list[SequenceOutput]:
        """One whole output for each text, in order.

        Raises:
            ApiError: A text could not be generated.
            ClientDisconnect: The client disconnected.
        """
        pieces: list[list[SequenceOutput]] = [[] for _ in range(self.num_texts)]

        async def collect() -> None:
            async for one in self.outputs():
                if one is not None:
                    pieces[one[0]].append(one[1])

        await run_in_time(self.context, collect(), grace=_GRACE_SECONDS)
        return [join_outputs(outputs) for outputs in pieces]

    def _measure(self, index: int, output: SequenceOutput) -> None:
        metrics, log_fields, now = self.context.state.metrics, self.context.log_fields, time.monotonic()
        tokens, last = self._running[index]
        if output.tokens:
            metrics.token(now - last, first=not tokens)
            log_fields.setdefault("first_token_seconds", round(now - self._started, 4))
            tokens += len(output.tokens)
            self.num_tokens += len(output.tokens)
            self._running[index] = tokens, now
        if output.finish_reason is not None:
            metrics.text_done(self.model.names, output.finish_reason, tokens)
            del self._running[index]

    def usage(self) -> dict[str, Any]:
        """Tokens read and generated; the prefix is not counted."""
        prompt_tokens = sum(len(request.prompt) for request in self.requests)
        return {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": self.num_tokens,
            "total_tokens": prompt_tokens + self.num_tokens,
        }


async def start_generation(
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
        PrefixError: The engine refuses it for another reason.
    """
    state, worker = context.state, context.state.worker
    if labels_of(model.prefix) is not None:
        message = f"the prefix {model.name!r} gives labels and writes no text."
        raise bad_request(message, "model", "not_a_generator", hint="use /classify.")
    _check_supported(worker, prompts, sampling)
    context.log_fields |= {"model": model.name, "prompt_tokens": sum(map(len, prompts))}
    sampling = sampling.replace(end_ids=(*sampling.end_ids, *special_stops(state.backbone, sampling.stop)))

    def request(prompt: tuple[int, ...]) -> Request:
        check_prompt_length(context, len(prompt), "prompt")
        chosen = sampling
        if default_max_tokens is not None:
            fitting = min(default_max_tokens, worker.available_tokens(len(prompt), model.prefix_length))
            chosen = sampling.replace(max_new_tokens=max(1, sampling.min_new_tokens, fitting))
        names = {"tenant": context.caller.name, "prefix_name": model.name, "id": uuid.uuid4().hex}
        return Request(prompt, model.prefix, chosen, n=n, verbatim=verbatim, grammar=grammar, **names)

    generation = Generation(context, model, [request(prompt) for prompt in prompts])
    _check_logprobs(generation.requests)
    try:
        # Before the queue: what can never fit must not be answered with "try again later".
        for one in generation.requests:
            worker.check_length(len(one.prompt), one.prefix_length, one.sampling.max_new_tokens)
        await generation.submit()
    except ContextLengthError as error:
        hint = f"shorten the prompt or lower max_tokens{', or join fewer prefixes' if model.parts else ''}."
        raise bad_request(error.message, "prompt", "context_length_exceeded", hint=hint) from None
    except EngineFull as error:
        if state.draining or not worker.healthy:
            raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
        raise too_many_requests(error.message, "queue_full", 1.0) from None
    for prompt in prompts:
        state.metrics.prompt(model.names, len(prompt))
    return generation


def check_prompt_length(context: RequestContext, tokens: int, param: str) -> None:
    """Refuse a prompt without a token, or with more than this server allows.

    Raises:
        ApiError: 400.
    """
    limit = context.state.config.max_prompt_tokens
    if not tokens:
        raise bad_request("the prompt has no token; some text is needed.", param)
    if limit and tokens > limit:
        raise bad_request(f"it has {tokens} tokens, but {limit} are allowed.", param, "context_length_exceeded")


def _check_supported(engine: Engine, prompts: Sequence[tuple[int, ...]], sampling: SamplingParams) -> None:
    """Refuse what the engine or the model does not have: parameters, tokens, an encoder prompt's log-probabilities."""
    for name, nothing in engine.lacks.items():
        if getattr(sampling, name) != nothing:
            param = _PARAMS.get(name, name)
            raise bad_request(f"this server's engine has no {param}.", param, "unsupported_field", hint="leave it out.")
    vocab_size = engine.vocab_size
    for param, tokens in (("prompt", itertools.chain(*prompts)), ("logit_bias", iter(sampling.logit_bias))):
        for token in tokens:
            if not 0 <= token < vocab_size:
                message = f"there is no token {token}: the model has {vocab_size:,}."
                raise bad_request(message, param, hint="use the ids of the backbone's own tokenizer.")
    if sampling.prompt_logprobs is not None and engine.backbone.kind == "encoder-decoder":
        message = "the model's encoder reads the prompt, whose tokens then have no log-probabilities."
        raise bad_request(message, "echo", hint="leave out echo or logprobs.")


def _check_logprobs(requests: Sequence[Request]) -> None:
    """Refuse a request whose response would be too large by its log-probabilities."""
    count = 0
    for one in requests:
        sampling = one.sampling
        for tokens, each in (
            (len(one.prompt), sampling.prompt_logprobs),
            (sampling.max_new_tokens, sampling.logprobs),
        ):
            count += 0 if each is None else one.n * tokens * (each + 1)
    if count > _MOST_LOGPROBS:
        message = f"the response would have {count:,} log-probabilities; at most {_MOST_LOGPROBS:,} are allowed."
        raise bad_request(message, "logprobs", "too_many_logprobs", hint="ask for fewer, or lower n or max_tokens.")


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
        message = "the engine failed; send the request again later."
        return unavailable(message, "engine_failed", retry_after=1)
    return failure


def engine_error(context: RequestContext, reason: str) -> ApiError:
    """500: the model failed on the request. Its own words are for the log only."""
    context.log_fields["engine_error"] = reason[:500]
    message = f"the engine failed on this request; the log has more on request {context.log_fields['id']}."
    return ApiError(500, message, code="engine_error")
