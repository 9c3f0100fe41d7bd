"""Requests of the engine on behalf of one call: handing them in, hearing of them, giving them up.

The engine tells its news in a thread of its own; here they arrive in the event loop. Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from prefixtune.engine.request import EngineFull, Request, SamplingParams, SequenceOutput, Token
from prefixtune.engine.worker import EngineWorker
from prefixtune.errors import PrefixError
from prefixtune.server.api.endpoint import Call, read_body
from prefixtune.server.api.protocol import GenerationRequest, parse_json
from prefixtune.server.limits import QueueFull
from prefixtune.server.metrics import Metrics
from prefixtune.server.models.catalog import Served
from prefixtune.server.responses import ApiError, EventStream, bad_request, run_until_disconnect, unavailable

__all__ = [
    "Generation",
    "Written",
    "collect",
    "encode",
    "in_turn",
    "read_json",
    "start_generation",
    "stream",
    "stream_outputs",
    "usage",
]


_SILENCE = 15.0
"""Seconds without news after which an empty one is given, so that a stream can say that it is alive."""


@dataclass(eq=False)
class _Text:
    """What was heard of one text."""

    tokens: int = 0
    last: float = 0.0


@dataclass(eq=False)
class Generation:
    """The engine's requests of one call.

    Attributes:
        worker: The engine.
        requests: One for each prompt.
        model: The name under which they are asked for.
        deadline: Seconds that they may take.
        metrics: Is told what is measured.
        first: Seconds to the first token of all.
        tokens: Tokens written so far.
    """

    worker: EngineWorker
    requests: Sequence[Request]
    model: str
    deadline: float
    metrics: Metrics
    first: float | None = field(default=None, init=False)
    tokens: int = field(default=0, init=False)
    _prompt_indices: dict[str, int] = field(init=False)
    _begun: float = field(default_factory=time.monotonic, init=False)
    _news: asyncio.Queue[SequenceOutput] = field(default_factory=asyncio.Queue, init=False)
    _open: dict[tuple[str, int], _Text] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self._prompt_indices = {request.id: index for index, request in enumerate(self.requests)}

    def submit(self) -> None:
        """Hand the requests in; `give_up` must follow in any case.

        Raises:
            PrefixError: The engine refuses one.
        """
        loop = asyncio.get_running_loop()

        def hear(output: SequenceOutput) -> None:
            # The loop may be gone when the server was told to stop at once.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(self._news.put_nowait, output)

        for request in self.requests:
            self.worker.submit(request, hear, deadline=self.deadline)
            self._open |= {(request.id, index): _Text() for index in range(request.n)}

    def give_up(self) -> None:
        """Free whatever still runs; nothing happens when all is done."""
        for request in {name for name, _ in self._open}:
            self.worker.cancel(request)
        for text in self._open.values():
            self.metrics.text_done(self.model, "gone", text.tokens)
        self._open.clear()

    async def heard(self) -> AsyncGenerator[SequenceOutput | None]:
        """News until every text has ended; None after a while without any."""
        while self._open:
            try:
                async with asyncio.timeout(_SILENCE):
                    output = await self._news.get()
            except TimeoutError:
                yield None
                continue
            self._measure(output)
            yield output

    def prompt_index(self, output: SequenceOutput) -> int:
        """Index of the output's prompt within the call."""
        return self._prompt_indices[output.request_id]

    def _measure(self, output: SequenceOutput) -> None:
        place = (output.request_id, output.index)
        text, now = self._open[place], time.monotonic()
        if output.tokens:
            if text.tokens:
                self.metrics.next_token(now - text.last)
            else:
                self.metrics.first_token(now - self._begun)
                self.first = self.first or now - self._begun
            text.last = now
            text.tokens += len(output.tokens)
            self.tokens += len(output.tokens)
        if output.finish_reason is not None:
            self.metrics.text_done(self.model, output.finish_reason, text.tokens)
            del self._open[place]


T = TypeVar("T")
_SMALL = 16 * 1024
"""Bytes of a body that is read where it arrives; a larger one in a thread, so that nobody's stream waits for it."""


@dataclass(eq=False)
class Written:
    """One text.

    Attributes:
        text: As far as it is there.
        tokens: Its tokens.
        finished: `stop` or `length`, once it has ended.
    """

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finished: str | None = None

    def add(self, output: SequenceOutput) -> None:
        """Take news in."""
        self.text += output.text
        self.tokens.extend(output.tokens)
        self.finished = output.finish_reason


async def read_json(call: Call) -> dict[str, Any]:
    """The object that the body of a call holds, within the server's limits.

    Raises:
        ApiError: It is no JSON, too large or too slow.
        Full: Too much is being read or worked on.
    """
    config = call.services.config
    most = 1024 * config.max_body_kib
    length = call.request.headers.get("content-length", "")
    # Counted before it is read, one without a length as the largest that is allowed.
    size = min(int(length), most) if length.isascii() and length.isdigit() else most
    if not call.services.bodies.has_room(size, call.tenant):
        raise QueueFull(f"requests of {call.services.bodies.total:,} bytes are being read or worked on", 1.0)
    with call.services.bodies.hold(size, call.tenant):
        body = await read_body(call.request, most=most, patience=config.client_timeout)
    # And as long as it is until the call ends: so long it is in memory, and its text may wait to be worked on.
    call.stack.enter_context(call.services.bodies.hold(len(body), call.tenant))
    return parse_json(body) if len(body) <= _SMALL else await asyncio.to_thread(parse_json, body)


def stream(call: Call, events: AsyncGenerator[str]) -> EventStream:
    """A reply in pieces, for a client that may be slow within limits."""
    config = call.services.config
    return EventStream(events, config.client_timeout, config.deadline + config.client_timeout, call.headers)


async def encode(call: Call, encoding: Callable[[], Sequence[int]]) -> tuple[int, ...]:
    """Token ids of one text (see `in_turn`)."""
    return tuple(await in_turn(call, encoding))


async def in_turn(call: Call, work: Callable[[], T]) -> T:
    """Work on one text, in a thread, as a long one must not hold up everybody's streams; callers take turns.

    Raises:
        ApiError: The call's time is over.
        ClientDisconnect: The client went away.
    """
    services = call.services
    loop = asyncio.get_running_loop()

    async def wait_and_work() -> T:
        async with services.turns.turn(call.tenant):
            return await loop.run_in_executor(services.tokenizing, work)

    try:
        async with asyncio.timeout(call.remaining):
            return await run_until_disconnect(call.request.receive, wait_and_work())
    except TimeoutError:
        raise _too_late(services.config.deadline) from None


def start_generation(
    call: Call,
    ask: GenerationRequest,
    served: Served,
    prompts: Sequence[tuple[int, ...]],
    default_length: int,
    *,
    verbatim: bool,
) -> Generation:
    """Hand the prompts to the engine, within the limits; they are given up when the call ends.

    Args:
        call: The call.
        ask: How tokens are chosen, and how many texts.
        served: With which prefix.
        prompts: Token ids.
        default_length: New tokens where the ask says nothing of them, as far as they fit.
        verbatim: The white space around the texts belongs to them.

    Raises:
        ApiError: A prompt is too long, or the engine takes nothing now.
        Full: There is no room.
    """
    services = call.services
    call.facts |= {"model": served.name, "prompt_tokens": sum(map(len, prompts))}
    requests = [
        Request(
            prompt,
            served.prefix,
            _sampling(call, ask, served, len(prompt), default_length),
            n=ask.n,
            tenant=call.tenant,
            prefix_name=served.name,
            verbatim=verbatim,
            id=uuid.uuid4().hex,
        )
        for prompt in prompts
    ]
    call.stack.enter_context(services.admission.enter(len(prompts) * ask.n, call.tenant))
    job = Generation(services.worker, requests, served.name, call.remaining, services.metrics)
    call.stack.callback(_end, call, job)
    try:
        job.submit()
    except EngineFull as error:
        if services.draining or not services.worker.healthy:
            raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
        raise QueueFull(error.message.rstrip("."), 1.0) from None
    except PrefixError as error:
        raise bad_request(error.message, hint=error.hint) from None
    for prompt in prompts:
        services.metrics.prompt(served.name, len(prompt))
    return job


def _end(call: Call, job: Generation) -> None:
    job.give_up()
    call.facts["completion_tokens"] = job.tokens
    if job.first is not None:
        call.facts["first_token_seconds"] = round(job.first, 4)


def _sampling(call: Call, ask: GenerationRequest, served: Served, length: int, default_length: int) -> SamplingParams:
    """The ask's sampling with a length that fits."""
    config, engine = call.services.config, call.services.engine
    if not length:
        raise bad_request("the prompt has no token; some text is needed.", "prompt")
    if config.max_prompt_tokens and length > config.max_prompt_tokens:
        raise bad_request(
            f"the prompt has {length} tokens, but {config.max_prompt_tokens} are allowed.",
            "prompt",
            "context_length_exceeded",
        )
    room = engine.room(length, served.prefix_length)
    wanted = ask.sampling.max_new_tokens if ask.says_length else max(1, ask.sampling.min_new_tokens)
    if wanted > room:
        raise bad_request(
            f"the request needs {engine.needs(length, served.prefix_length, wanted)}.",
            "prompt",
            "context_length_exceeded",
            hint="shorten the prompt or lower max_tokens.",
        )
    chosen = wanted if ask.says_length else min(max(wanted, default_length), room)
    return replace(ask.sampling, max_new_tokens=chosen, min_new_tokens=min(ask.sampling.min_new_tokens, chosen))


async def stream_outputs(call: Call, job: Generation) -> AsyncGenerator[SequenceOutput | None]:
    """News of a job's texts, until all have ended; None where there is none for long.

    Raises:
        ApiError: One of them could not be written.
    """
    async with contextlib.aclosing(job.heard()) as news:
        async for output in news:
            if output is not None and output.finish_reason not in (None, "stop", "length"):
                raise _failure(call, output)
            yield output


async def collect(call: Call, job: Generation) -> list[list[Written]]:
    """For each prompt, its texts; given up when the client goes away.

    Raises:
        ApiError: One of them could not be written.
        ClientDisconnect: The client went away.
    """

    async def work() -> list[list[Written]]:
        written = [[Written() for _ in range(request.n)] for request in job.requests]
        async for output in stream_outputs(call, job):
            if output is not None:
                written[job.prompt_index(output)][output.index].add(output)
        return written

    return await run_until_disconnect(call.request.receive, work())


def _failure(call: Call, output: SequenceOutput) -> ApiError:
    """Why a text was not written."""
    call.facts["finished"] = output.finish_reason
    if output.finish_reason == "timeout":
        return _too_late(call.services.config.deadline)
    if output.finish_reason == "cancelled":
        return unavailable("the server is about to stop; the request was given up.", "draining", retry_after=5)
    # What the engine says of it is for the log.
    call.facts["engine_error"] = output.error[:500]
    if output.engine_crashed:
        return unavailable("the engine broke and starts anew; send the request again.", "engine_failed", retry_after=1)
    message = f"the engine failed on this request; the log tells more of the request {call.facts['id']}."
    return ApiError(500, message, code="engine_error")


def _too_late(seconds: float) -> ApiError:
    message = f"the request was not done within {seconds:g} seconds."
    # Another try, by a client or by a load balancer, would take as long.
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


def usage(job: Generation) -> dict[str, Any]:
    """Tokens read and written; the prefix is not counted."""
    read = sum(len(request.prompt) for request in job.requests)
    return {"prompt_tokens": read, "completion_tokens": job.tokens, "total_tokens": read + job.tokens}
