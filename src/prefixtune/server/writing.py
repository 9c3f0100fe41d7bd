"""What all endpoints that write text share: token ids of a prompt, a job within its limits, and what comes of it.

Knows nothing of the shapes of replies.
"""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from prefixtune.engine import FullError, Output, Request, Sampling, Token
from prefixtune.errors import PrefixError
from prefixtune.server.asks import Ask, parse_json
from prefixtune.server.catalog import Served
from prefixtune.server.endpoint import Call, read_body
from prefixtune.server.jobs import Full, Heard, Job
from prefixtune.server.replies import ApiError, EventStream, unavailable, unless_gone, wrong

__all__ = ["Written", "begin", "collect", "encode", "follow", "in_turn", "read_json", "stream", "usage"]

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

    def add(self, output: Output) -> None:
        """Take news in."""
        self.text += output.text
        self.tokens.extend(output.tokens)
        self.finished = output.finished


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
        raise Full(f"requests of {call.services.bodies.total:,} bytes are being read or worked on", 1.0)
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
            return await unless_gone(call.request.receive, wait_and_work())
    except TimeoutError:
        raise _too_late(services.config.deadline) from None


def begin(
    call: Call,
    ask: Ask,
    served: Served,
    prompts: Sequence[tuple[int, ...]],
    default_length: int,
    *,
    verbatim: bool,
) -> Job:
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
    job = Job(services.worker, requests, served.name, call.remaining, services.metrics)
    call.stack.callback(_end, call, job)
    try:
        job.submit()
    except FullError as error:
        if services.draining or not services.worker.healthy:
            raise unavailable(error.message, "engine_unavailable", retry_after=5) from None
        raise Full(error.message.rstrip("."), 1.0) from None
    except PrefixError as error:
        raise wrong(error.message, hint=error.hint) from None
    for prompt in prompts:
        services.metrics.prompt(served.name, len(prompt))
    return job


def _end(call: Call, job: Job) -> None:
    job.give_up()
    call.facts["completion_tokens"] = job.tokens
    if job.first is not None:
        call.facts["first_token_seconds"] = round(job.first, 4)


def _sampling(call: Call, ask: Ask, served: Served, length: int, default_length: int) -> Sampling:
    """The ask's sampling with a length that fits."""
    config, engine = call.services.config, call.services.engine
    if not length:
        raise wrong("the prompt has no token; some text is needed.", "prompt")
    if config.max_prompt_tokens and length > config.max_prompt_tokens:
        raise wrong(
            f"the prompt has {length} tokens, but {config.max_prompt_tokens} are allowed.",
            "prompt",
            "context_length_exceeded",
        )
    room = engine.room(length, served.prefix_length)
    wanted = ask.sampling.max_new_tokens if ask.says_length else max(1, ask.sampling.min_new_tokens)
    if wanted > room:
        raise wrong(
            f"the request needs {engine.needs(length, served.prefix_length, wanted)}.",
            "prompt",
            "context_length_exceeded",
            hint="shorten the prompt or lower max_tokens.",
        )
    chosen = wanted if ask.says_length else min(max(wanted, default_length), room)
    return replace(ask.sampling, max_new_tokens=chosen, min_new_tokens=min(ask.sampling.min_new_tokens, chosen))


async def follow(call: Call, job: Job) -> AsyncGenerator[Heard | None]:
    """News of a job's texts, until all have ended; None where there is none for long.

    Raises:
        ApiError: One of them could not be written.
    """
    async with contextlib.aclosing(job.heard()) as news:
        async for heard in news:
            if heard is not None and heard.output.finished not in (None, "stop", "length"):
                raise _failure(call, heard.output)
            yield heard


async def collect(call: Call, job: Job) -> list[list[Written]]:
    """For each prompt, its texts; given up when the client goes away.

    Raises:
        ApiError: One of them could not be written.
        ClientDisconnect: The client went away.
    """

    async def work() -> list[list[Written]]:
        written = [[Written() for _ in range(request.n)] for request in job.requests]
        async for heard in follow(call, job):
            if heard is not None:
                written[heard.prompt][heard.output.index].add(heard.output)
        return written

    return await unless_gone(call.request.receive, work())


def _failure(call: Call, output: Output) -> ApiError:
    """Why a text was not written."""
    call.facts["finished"] = output.finished
    if output.finished == "timeout":
        return _too_late(call.services.config.deadline)
    if output.finished == "cancelled":
        return unavailable("the server is about to stop; the request was given up.", "draining", retry_after=5)
    # What the engine says of it is for the log.
    call.facts["engine_error"] = output.error[:500]
    if output.crashed:
        return unavailable("the engine broke and starts anew; send the request again.", "engine_failed", retry_after=1)
    message = f"the engine failed on this request; the log tells more of the request {call.facts['id']}."
    return ApiError(500, message, code="engine_error")


def _too_late(seconds: float) -> ApiError:
    message = f"the request was not done within {seconds:g} seconds."
    # Another try, by a client or by a load balancer, would take as long.
    return ApiError(504, message, code="deadline_exceeded", headers={"x-should-retry": "false"})


def usage(job: Job) -> dict[str, Any]:
    """Tokens read and written; the prefix is not counted."""
    read = sum(len(request.prompt) for request in job.requests)
    return {"prompt_tokens": read, "completion_tokens": job.tokens, "total_tokens": read + job.tokens}
