"""OpenAI's `/v1/completions` and `/v1/chat/completions`, whole and as streams.

Under a prefix's name, a prompt or a chat's last message is a source: it gets the text format that the prefix was
trained with, and the target alone comes back. Otherwise (the bare backbone, token ids, `raw_completions`, a prefix
whose file stores no format) a prompt goes to the model as it is, and a chat through the backbone's own template; what
comes back is what the model wrote, white space around it included.
"""

from __future__ import annotations

import asyncio
import functools
import time
import uuid
from collections.abc import AsyncGenerator, Callable, Sequence
from functools import partial
from typing import Any

from starlette.types import ASGIApp

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.prefix.text_format import TargetStream, TextFormat
from prefixtune.prefix.token_offsets import TargetOffsets
from prefixtune.server.api.endpoint import Call
from prefixtune.server.api.generation import (
    Generation,
    Written,
    collect,
    encode,
    read_json,
    start_generation,
    stream,
    stream_outputs,
    usage,
)
from prefixtune.server.api.prompting import encode_source, source_of_chat, with_customs
from prefixtune.server.api.protocol import GenerationRequest, parse_chat, parse_completion
from prefixtune.server.models.catalog import Served
from prefixtune.server.responses import ALIVE, DONE, bad_request, event, reply

__all__ = ["chat", "complete"]


_LOWEST = -9999.0
"""What stands for the logarithm of zero, as JSON has no infinity."""


async def complete(call: Call) -> ASGIApp:
    """`POST /v1/completions`."""
    ask = parse_completion(await read_json(call), call.services.limits)
    served = await call.services.catalog.open(ask.model, call.caller)
    backbone = call.services.backbone
    if call.services.config.log_prompts:
        call.facts["prompts"] = ask.prompts
    texts = [prompt for prompt in ask.prompts if isinstance(prompt, str)]
    raw = call.services.config.raw_completions or not texts
    text_format = None if raw else call.services.catalog.trained_format(served.header)
    if text_format is not None:
        return await _answer_sources(call, ask, served, text_format, texts, _Completion(backbone, ask.n, text_format))
    prompts = [
        await encode(call, partial(_encode_text, backbone, prompt)) if isinstance(prompt, str) else prompt
        for prompt in ask.prompts
    ]
    job = start_generation(call, ask, served, prompts, call.services.config.default_max_tokens, verbatim=True)
    return await _answer(call, ask, job, _Completion(backbone, ask.n))


async def chat(call: Call) -> ASGIApp:
    """`POST /v1/chat/completions`."""
    ask = parse_chat(await read_json(call), call.services.limits)
    served = await call.services.catalog.open(ask.model, call.caller)
    if call.services.config.log_prompts:
        call.facts["messages"] = ask.messages
    text_format = call.services.catalog.trained_format(served.header)
    if text_format is not None:
        source = source_of_chat(call, ask.messages)
        return await _answer_sources(call, ask, served, text_format, [source], _Chat(call.services.backbone))
    prompt = await encode(call, lambda: _encode_chat(call.services.backbone, ask.messages))
    job = start_generation(call, ask, served, [prompt], call.services.config.default_max_tokens, verbatim=True)
    return await _answer(call, ask, job, _Chat(call.services.backbone))


def _encode_text(backbone: Backbone, text: str) -> list[int]:
    return backbone.encode_sources([text])[0]


def _encode_chat(backbone: Backbone, messages: Sequence[dict[str, str]]) -> list[int]:
    from jinja2 import TemplateError

    if not backbone.tokenizer.chat_template:
        raise bad_request(
            "the backbone has no chat template.",
            "messages",
            "no_chat_template",
            hint="use /v1/completions, or /v1/tasks/ and the name of a prefix.",
        )
    try:
        ids: list[int] = backbone.tokenizer.apply_chat_template(
            list(messages), tokenize=True, add_generation_prompt=True, return_dict=False
        )
    except TemplateError as error:
        raise bad_request(f"the backbone's chat template refuses the messages: {error}.", "messages") from None
    return ids


# --- the flow, which both share ---------------------------------------------------------------------------------------


async def _answer_sources(
    call: Call,
    ask: GenerationRequest,
    served: Served,
    text_format: TextFormat,
    sources: Sequence[str],
    shape: _Completion | _Chat,
) -> ASGIApp:
    """Write the targets of sources, as `/v1/tasks` does."""
    ask, length = await with_customs(call, ask, served)
    most = ask.sampling.max_new_tokens if ask.says_length else length
    prompts = [await encode_source(call, served, text_format, source, most) for source in sources]
    job = start_generation(call, ask, served, prompts, length, verbatim=False)
    return await _answer(call, ask, job, shape, text_format)


async def _answer(
    call: Call,
    ask: GenerationRequest,
    job: Generation,
    shape: _Completion | _Chat,
    text_format: TextFormat | None = None,
) -> ASGIApp:
    head = {"id": f"{shape.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": job.model}
    if ask.stream:
        return stream(call, _events(call, ask, job, shape, head, text_format))
    written = [text for texts in await collect(call, job) for text in texts]
    targets = [text.text if text_format is None else text_format.extract_target(text.text) for text in written]
    if call.services.config.log_prompts:
        call.facts["outputs"] = targets

    def whole() -> ASGIApp:
        pairs = zip(written, targets, strict=True)
        choices = [shape.choice(number, text, target) for number, (text, target) in enumerate(pairs)]
        return reply({**head, "object": shape.whole, "choices": choices, "usage": usage(job)}, headers=call.headers)

    # Thousands of tokens, each with its likeliest ones in words, take seconds.
    return whole() if ask.sampling.logprobs is None else await asyncio.to_thread(whole)


async def _events(
    call: Call,
    ask: GenerationRequest,
    job: Generation,
    shape: _Completion | _Chat,
    head: dict[str, Any],
    text_format: TextFormat | None,
) -> AsyncGenerator[str]:
    count = len(job.requests) * ask.n
    targets = [] if text_format is None else [TargetStream(text_format) for _ in range(count)]
    head = {**head, "object": shape.pieces}
    unsaid = {"usage": None} if ask.include_usage else {}
    for number in range(count):
        for choice in shape.opening(number):
            yield event({**head, "choices": [choice], **unsaid})
    async for output in stream_outputs(call, job):
        if output is None:
            yield ALIVE
            continue
        number = job.prompt_index(output) * ask.n + output.index
        ended = output.finish_reason is not None
        target = targets[number].add(output.text, last=ended) if targets else output.text
        for choice in shape.news(number, output, target):
            yield event({**head, "choices": [choice], **unsaid})
    if ask.include_usage:
        yield event({**head, "choices": [], "usage": usage(job)})
    yield DONE


class _Completion:
    """How replies look: `text_completion`. Choices are numbered through all prompts.

    Args:
        backbone: Whose tokens they are.
        n: Texts for each prompt.
        text_format: That targets are taken out of; None: texts are given as they are.
    """

    prefix, whole, pieces = "cmpl", "text_completion", "text_completion"

    def __init__(self, backbone: Backbone, n: int, text_format: TextFormat | None = None) -> None:
        self.decode = _token_text(backbone)
        self.n = n
        self.text_format = text_format
        self.ends: dict[int, int] = {}
        self.offsets: dict[int, TargetOffsets] = {}

    def choice(self, number: int, written: Written, target: str) -> dict[str, Any]:
        """A whole text."""
        logprobs = self._in_target(number, target, self._logprobs(number, written.tokens), last=True)
        return {"index": number, "text": target, "logprobs": logprobs, "finish_reason": written.finished}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def news(self, number: int, output: SequenceOutput, target: str) -> list[dict[str, Any]]:
        """A piece, with the reason of the end where it is the last."""
        logprobs = self._logprobs(number, output.tokens)
        logprobs = self._in_target(number, target, logprobs, last=output.finish_reason is not None)
        if not target and logprobs is None and output.finish_reason is None:
            return []
        return [{"index": number, "text": target, "logprobs": logprobs, "finish_reason": output.finish_reason}]

    def _in_target(
        self, number: int, target: str, logprobs: dict[str, Any] | None, *, last: bool
    ) -> dict[str, Any] | None:
        """The same with offsets that count within the target."""
        if self.text_format is None:
            return logprobs
        offsets = self.offsets.setdefault(number, TargetOffsets(self.text_format))
        return offsets.add(target, logprobs, last=last)

    def _logprobs(self, number: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not any(token.logprob is not None for token in tokens):
            return None
        texts = [self.decode(token.id) for token in tokens]
        offsets = []
        for text in texts:
            offsets.append(self.ends.get(number, 0))
            self.ends[number] = offsets[-1] + len(text)
        likeliest = []
        for token, text in zip(tokens, texts, strict=True):
            pairs: dict[str, float] = {}
            for other, value in token.top_logprobs:
                pairs.setdefault(self.decode(other), _finite(value))
            likeliest.append({**pairs, text: _finite(token.logprob)})
        return {
            "tokens": texts,
            "token_logprobs": [_finite(token.logprob) for token in tokens],
            "top_logprobs": likeliest,
            "text_offset": offsets,
        }


class _Chat:
    """How replies look: `chat.completion`.

    Args:
        backbone: Whose tokens they are.
    """

    prefix, whole, pieces = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, backbone: Backbone) -> None:
        self.decode = _token_text(backbone)

    def choice(self, number: int, written: Written, target: str) -> dict[str, Any]:
        """A whole message."""
        message = {"role": "assistant", "content": target, "refusal": None}
        logprobs = self._logprobs(written.tokens)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": written.finished}

    def opening(self, number: int) -> list[dict[str, Any]]:
        """Who speaks."""
        return [self._piece(number, {"role": "assistant", "content": ""})]

    def news(self, number: int, output: SequenceOutput, target: str) -> list[dict[str, Any]]:
        """A piece, and the end by itself."""
        logprobs = self._logprobs(output.tokens)
        pieces = []
        if target or logprobs is not None:
            pieces.append(self._piece(number, {"content": target}, logprobs))
        if output.finish_reason is not None:
            pieces.append(self._piece(number, {}, finished=output.finish_reason))
        return pieces

    def _piece(self, number: int, delta: Any, logprobs: Any = None, finished: str | None = None) -> dict[str, Any]:
        return {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": finished}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not any(token.logprob is not None for token in tokens):
            return None
        return {
            "content": [
                {
                    **self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(*pair) for pair in token.top_logprobs],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _token(self, token: int, logprob: float | None) -> dict[str, Any]:
        text = self.decode(token)
        # A part of a character has no text of its own, and its bytes are not told.
        known = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": known}


def _token_text(backbone: Backbone) -> Callable[[int], str]:
    """Token -> its text, special tokens by their names; the same ones come again and again."""

    @functools.lru_cache(maxsize=10_000)
    def decode(token: int) -> str:
        return str(backbone.tokenizer.decode([token], clean_up_tokenization_spaces=False))

    return decode


def _finite(value: float | None) -> float:
    return _LOWEST if value is None else max(value, _LOWEST)
