"""Texts for a request: sources -> prompts -> the engine -> outputs, whole or as server-sent events.

A source is written in the text format that the prefix was trained with. What still runs when the response ends is
cancelled.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from functools import partial
from typing import Any

from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse
from fastapi.sse import format_sse_event

from prefixtune.data.chat import Source, as_conversation, encode_chat, end_ids, has_chat_template, special_stops
from prefixtune.data.encoding import AS_IT_IS, encode_prompts, plain_format
from prefixtune.data.labels import labels_of
from prefixtune.data.registry import default_decoding
from prefixtune.data.truncation import truncate_prompt
from prefixtune.engine.request import (
    EngineFull,
    Request,
    SamplingParams,
    SequenceOutput,
    join_outputs,
)
from prefixtune.errors import ConfigError, ContextLengthError, RequestError
from prefixtune.inference.prompts import newline_tokens
from prefixtune.prefix.text_format import TextFormat
from prefixtune.sampling.grammar import Grammar, compile_json_schema
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.catalog import ServedModel
from prefixtune.server.responses import ApiError, bad_request, json_text, unavailable

KEEP_ALIVE_SECONDS = 15.0
"""Seconds without an output after which a stream says that it is alive."""
KEEP_ALIVE = format_sse_event(comment="waiting")
"""Proxies cut silent connections, and clients ignore comments."""
DONE = format_sse_event(data_str="[DONE]")
"""The end of a stream."""
_GRACE_SECONDS = 10.0
"""The engine ends what is too late, at the end of its step."""
_PARAMS = {"min_new_tokens": "min_tokens", "prompt_logprobs": "echo"}
"""Sampling parameters -> their names in requests, where they differ."""
_MOST_LOGPROBS = 200_000
_CUT_HEADER = "x-prefixtune-cut-tokens"
"""Tokens of sources that were cut off because they did not fit; of one that is far too long, at least so many."""

Ids = tuple[int, ...]


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
        """Submit the requests to the engine.

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

        await self.context.run_in_time(collect(), grace=_GRACE_SECONDS)
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
        read, written = sum(len(request.prompt) for request in self.requests), self.num_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


# --- from a request to the engine -------------------------------------------------------------------------------------


async def start_texts(
    context: RequestContext,
    request: GenerationRequest,
    model: ServedModel,
    text_format: TextFormat | None,
    sources: Sequence[Source | Ids],
    n: int = 1,
    *,
    verbatim: bool = False,
) -> Generation:
    """Generate the targets of sources, with the decoding of the prefix's task where the request has none of its own.

    Args:
        context: The HTTP request.
        request: Its body.
        model: With which prefix.
        text_format: Of the sources; None: texts and token ids are continued as they are, and conversations are written
            in the backbone's own chat template.
        sources: Each a text, a conversation, or token ids.
        n: Texts for each source.
        verbatim: Keep the white space around the texts, as always without a text format.

    Raises:
        ApiError: A source is too long or cannot be written, something is asked for that the model does not have, or
            the engine takes no request now.
        PrefixError: The engine refuses it for another reason.
    """
    config, worker = context.state.config, context.state.worker
    if labels_of(model.prefix) is not None:
        message = f"the prefix {model.name!r} gives labels and writes no text."
        raise bad_request(message, "model", "not_a_generator", hint="use /classify.")
    defaults = {} if text_format is None else default_decoding(model.header.get("task"), [model.header])
    length = request.length
    if length is None:
        usual = min(defaults.get("max_new_tokens", config.default_max_tokens), config.max_tokens)
        length = max(usual, request.min_tokens)
    least = request.min_tokens if request.length is None else length
    prompts = [await _encode(context, model, text_format, source, least, length) for source in sources]
    is_chat = isinstance(sources[0], list) or (text_format is not None and text_format.is_chat)
    sampling = await _sampling(context, request, defaults, length, text_format, is_chat=is_chat)
    grammar = await _compile_grammar(context, request)
    context.log_fields |= {"model": model.name, "prompt_tokens": sum(map(len, prompts))}
    requests: list[Request] = []
    for prompt in prompts:
        if not prompt:
            raise bad_request("the prompt has no token; some text is needed.", "prompt")
        most = length
        if request.length is None:
            fitting = min(length, worker.available_tokens(len(prompt), model.prefix_length))
            most = max(1, sampling.min_new_tokens, fitting)
        names = {"tenant": context.caller.name, "prefix_name": model.name, "id": uuid.uuid4().hex}
        as_it_is, chosen = verbatim or text_format is None, sampling.replace(max_new_tokens=most)
        requests.append(Request(prompt, model.prefix, chosen, n=n, verbatim=as_it_is, grammar=grammar, **names))
    _check_logprobs(requests)
    generation = Generation(context, model, requests)
    try:
        await generation.submit()
    except ContextLengthError as error:
        hint = f"shorten the prompt or lower max_tokens{', or join fewer prefixes' if len(model.names) > 1 else ''}."
        raise bad_request(error.message, _source_field(context), "context_length_exceeded", hint=hint) from None
    except EngineFull as error:
        raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
    except RequestError as error:
        unknown = any(not 0 <= token < worker.backbone.num_embeddings for prompt in prompts for token in prompt)
        raise bad_request(error.message, "prompt" if unknown else "logit_bias", hint=error.hint) from None
    for prompt in prompts:
        context.state.metrics.prompt(model.names, len(prompt))
    return generation


def _source_field(context: RequestContext) -> str | None:
    """The field of a request that its text is in; None: a task has others."""
    path = context.request.url.path
    return "messages" if path.endswith("/chat/completions") else "prompt" if path.endswith("/completions") else None


def _check_logprobs(requests: Sequence[Request]) -> None:
    """Bound what log-probabilities take: some 230 bytes of memory each (336,000 took 75 MB).

    Raises:
        ApiError: 400.
    """
    count = 0
    for one in requests:
        asked = one.sampling
        for tokens, each in ((len(one.prompt), asked.prompt_logprobs), (asked.max_new_tokens, asked.logprobs)):
            count += 0 if each is None else one.n * tokens * (each + 1)
    if count > _MOST_LOGPROBS:
        message = f"the response would have {count:,} log-probabilities, but {_MOST_LOGPROBS:,} are the most."
        raise bad_request(message, "logprobs", "too_many_logprobs", hint="ask for fewer, or lower n or max_tokens.")


async def _sampling(
    context: RequestContext,
    request: GenerationRequest,
    defaults: Mapping[str, Any],
    length: int,
    text_format: TextFormat | None,
    *,
    is_chat: bool,
) -> SamplingParams:
    """How tokens are chosen.

    Raises:
        ApiError: The engine lacks something that is asked for.
    """
    backbone, lacks = context.state.backbone, context.state.worker.lacks
    sampling = request.sampling(length)
    changes: dict[str, Any] = {}
    if request.json_schema is None and "min_tokens" not in request.model_fields_set and "min_new_tokens" not in lacks:
        changes["min_new_tokens"] = min(defaults.get("min_new_tokens", 0), length)
    if defaults.get("ban_newlines"):
        # Takes a while the first time, and is cached.
        changes["banned"] = tuple(await context.tokenize(partial(newline_tokens, backbone)))
    ends = await context.tokenize(partial(end_ids, backbone, text_format)) if is_chat else ()
    changes["end_ids"] = tuple(dict.fromkeys((*ends, *backbone.more_end_ids, *special_stops(backbone, sampling.stop))))
    sampling = sampling.replace(**changes)
    for name in lacks:
        if getattr(sampling, name) != sampling.default(name):
            param = _PARAMS.get(name, name)
            raise bad_request(f"this server's engine has no {param}.", param, "unsupported_field", hint="leave it out.")
    return sampling


async def _encode(
    context: RequestContext,
    model: ServedModel,
    text_format: TextFormat | None,
    source: Source | Ids,
    least: int,
    length: int,
) -> Ids:
    """Token ids of a source; one that is too long for its prefix is treated as in training.

    Behind it there is room for `length` new tokens; for fewer, but no fewer than `least`, where training did not cut a
    prompt that is as long.
    """
    if isinstance(source, tuple):
        return source
    backbone, positions = context.state.backbone, context.state.worker.max_length
    form = AS_IT_IS if model.prefix is not None else plain_format(backbone)
    if text_format is not None:
        form = text_format.with_lengths(on_too_long=context.state.config.on_too_long)

    def encode() -> tuple[list[int], int]:
        param, code = _source_field(context), None
        try:
            if text_format is None and not isinstance(source, str):
                if not has_chat_template(backbone):
                    hint = "use /v1/completions, or /v1/tasks/ and the name of a prefix."
                    raise bad_request("the backbone has no chat template.", param, "no_chat_template", hint=hint)
                return encode_chat(backbone, as_conversation(source), positions=positions), 0
            whole = encode_prompts(backbone, form, [source], positions=positions)[0]
            if text_format is None:
                return whole, 0
            code = "context_length_exceeded"
            left = positions - backbone.prefix_positions(model.prefix_length) - len(whole)
            new_tokens = max(least, form.fitting_tokens(len(whole), left, length))
            room = {"prefix_length": model.prefix_length, "new_tokens": new_tokens, "positions": positions}
            ids = truncate_prompt(backbone, form, whole, **room, name="the prompt", source=source)
        except RequestError as error:
            raise bad_request(error.message, param, code, hint=error.hint) from None
        return ids, len(whole) - len(ids)

    ids, num_cut = await context.tokenize(encode)
    if num_cut > 0:
        context.log_fields["cut_tokens"] = context.log_fields.get("cut_tokens", 0) + num_cut
        context.headers[_CUT_HEADER] = str(context.log_fields["cut_tokens"])
    return tuple(ids)


async def _compile_grammar(context: RequestContext, request: GenerationRequest) -> Grammar | None:
    """The grammar of a request's `response_format`, compiled outside the event loop; None: it has none.

    Raises:
        ApiError: The schema cannot be used, or this server lacks what is needed.
    """
    if request.json_schema is None:
        return None
    try:
        return await context.tokenize(partial(compile_json_schema, context.state.worker.backbone, request.json_schema))
    except (RequestError, ConfigError) as error:
        code = "invalid_schema" if isinstance(error, RequestError) else "unsupported_field"
        raise bad_request(error.message, "response_format", code, hint=error.hint) from None


# --- from the engine to a response ------------------------------------------------------------------------------------


def event(value: Any) -> bytes:
    """A server-sent event."""
    return format_sse_event(data_str=json_text(value))


def event_stream(context: RequestContext, events: AsyncGenerator[bytes]) -> StreamingResponse:
    """A stream of server-sent events.

    The status is sent before the first event, so a later error is sent as the last one.
    """

    async def with_error() -> AsyncGenerator[bytes]:
        async with contextlib.aclosing(events):
            try:
                async for data in events:
                    yield data
            except ApiError as error:
                yield event(error.body())

    # nginx must not buffer the events.
    headers = {"x-accel-buffering": "no", **context.headers}
    return StreamingResponse(with_error(), headers=headers, media_type="text/event-stream")


def _failure(context: RequestContext, output: SequenceOutput) -> ApiError:
    """Why a text was not generated."""
    context.log_fields["finished"] = output.finish_reason
    if output.finish_reason == "timeout":
        return context.deadline_exceeded()
    if output.finish_reason == "cancelled":
        return unavailable("the server is shutting down; the request was cancelled.", "draining", retry_after=5)
    if output.refused:
        hint = "use a simpler schema, with fewer optional properties or alternatives."
        return bad_request(output.error, "response_format", "invalid_schema", hint=hint)
    failure = engine_error(context, output.error)
    if output.engine_crashed:
        return unavailable("the engine failed; send the request again later.", "engine_failed", retry_after=1)
    return failure


def engine_error(context: RequestContext, reason: str) -> ApiError:
    """500: the model failed on the request. Its own words are for the log only."""
    context.log_fields["engine_error"] = reason[:500]
    message = f"the engine failed on this request; the log has more on request {context.log_fields['id']}."
    return ApiError(500, message, code="engine_error")
