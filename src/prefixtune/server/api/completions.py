"""OpenAI's `/v1/completions` and `/v1/chat/completions`, whole and as streams.

With a prefix, a prompt or a chat's last message is a source: it is put into the text format that the prefix was trained
with, and the response is the target alone. Where that format has a chat template, all messages of a chat are written by
it, and a prompt is one user message. Otherwise a prompt goes to the model as it is, and a chat in the backbone's own
template. This is so for the bare backbone, token ids, `raw_completions`, and a prefix whose file has no format. The
response is what the model generated, with the white space around it.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from fastapi import Response
from fastapi.concurrency import run_in_threadpool

from prefixtune.data.chat import Source
from prefixtune.engine.request import SequenceOutput
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.server.api.choices import ChatChoices, CompletionChoices
from prefixtune.server.api.endpoint import GenerationContext, RequestContext, key_router
from prefixtune.server.api.generation import DONE, KEEP_ALIVE, Generation, event, event_stream, start_texts
from prefixtune.server.api.protocol import ChatRequest, CompletionRequest, OpenAIRequest
from prefixtune.server.catalog import ROUTE, ServedModel
from prefixtune.server.responses import JsonAnswer, bad_request

_DROPPED_HEADER = "x-prefixtune-dropped-messages"
"""Messages of a chat that were dropped because the prefix reads one text."""
Choices = CompletionChoices | ChatChoices
router = key_router()


@router.post("/v1/completions", name="complete")
async def create_completion(request: CompletionRequest, context: GenerationContext) -> Response:
    """Continue a prompt."""
    backbone, prompts, echo = context.state.backbone, request.prompts, request.echo
    model = await _load(context, request)
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    raw = context.state.config.raw_completions or not texts
    text_format = None if raw else read_text_format(model.header)
    generation = await start_texts(context, request, model, text_format, prompts, request.n, verbatim=echo)
    if not echo:
        choices = CompletionChoices(backbone, has_offsets=text_format is None)
        return await _respond(context, request, generation, choices, text_format)
    # What the model read, and what it generated, both as they are.
    if not (raw and texts):
        decode = partial(backbone.tokenizer.decode, clean_up_tokenization_spaces=False)
        read = [list(one.prompt) for one in generation.requests]
        texts = await context.tokenize(lambda: [str(decode(prompt)) for prompt in read])
    return await _respond(context, request, generation, CompletionChoices(backbone, texts, request.n))


@router.post("/v1/chat/completions", name="chat")
async def create_chat_completion(request: ChatRequest, context: GenerationContext) -> Response:
    """Answer a chat, in the prefix's text format or the backbone's chat template."""
    (messages,) = request.prompts
    model = await _load(context, request)
    text_format = read_text_format(model.header)
    source = messages if text_format is None else _source(context, messages, text_format)
    generation = await start_texts(context, request, model, text_format, [source], request.n)
    return await _respond(context, request, generation, ChatChoices(context.state.backbone), text_format)


def _source(context: RequestContext, messages: list[dict[str, str]], text_format: TextFormat) -> Source:
    """The source of a chat with a prefix: with a chat template all messages, else the last one; which is the user's.

    Raises:
        ApiError: It is not the user's; or there are earlier messages that the prefix cannot read, and the server does
            not drop them.
    """
    last, num_earlier = messages[-1], len(messages) - 1
    if last["role"] != "user" or not last["content"].strip():
        raise bad_request("the last message must be the user's, and have some text.", "messages")
    if text_format.is_chat:
        return messages
    if num_earlier and context.state.config.earlier_messages == "refuse":
        hint = "send the last user message alone, or have the server drop the others (earlier_messages = 'drop')."
        message = f"this prefix reads one text, but the chat has {len(messages)} messages."
        raise bad_request(message, "messages", "messages_not_carried", hint=hint)
    if num_earlier:
        context.log_fields["dropped_messages"] = num_earlier
        context.headers[_DROPPED_HEADER] = str(num_earlier)
    return last["content"]


async def _load(context: RequestContext, request: OpenAIRequest) -> ServedModel:
    """The requested model, once the request is checked and counted."""
    request.check(context.state.config)
    context.admit(len(request.prompts) * request.n)
    catalog, model = context.state.catalog, request.model
    if model.startswith(ROUTE):
        if request.prefixes:
            raise bad_request("a model 'route:' and 'prefixes' exclude each other.", "prefixes")
        prompt, *others = request.prompts
        text = prompt[-1]["content"] if isinstance(prompt, list) else prompt
        if others or not isinstance(text, str):
            raise bad_request("one text at a time is routed, and no token ids.", "prompt")
        model = await run_in_threadpool(catalog.route, model, text, context.caller)
    return await context.state.run_loading(catalog.load, model, context.caller, request.prefixes)


async def _respond(
    context: RequestContext,
    request: OpenAIRequest,
    generation: Generation,
    choices: Choices,
    text_format: TextFormat | None = None,
) -> Response:
    head = {
        "id": f"{choices.id_prefix}-{uuid.uuid4().hex}",
        "created": int(time.time()),
        "model": generation.model.name,
        "object": choices.chunk_object if request.stream else choices.whole_object,
    }
    if request.stream:
        return event_stream(context, _events(request, generation, choices, text_format, head))
    outputs = await generation.collect()

    def respond() -> Response:
        whole = [
            choices.whole(index, one, one.text if text_format is None else text_format.extract_target(one.text))
            for index, one in enumerate(outputs)
        ]
        return JsonAnswer({**head, "choices": whole, "usage": generation.usage()}, headers=context.headers)

    # Decoding the likeliest tokens of thousands of positions takes seconds.
    return await run_in_threadpool(respond)


async def _events(
    request: OpenAIRequest,
    generation: Generation,
    choices: Choices,
    text_format: TextFormat | None,
    head: dict[str, Any],
) -> AsyncGenerator[bytes]:
    # Words around a target can only be removed from the whole output.
    held, needs_all = [""] * generation.num_texts, text_format is not None and any(text_format.target_words)
    # As OpenAI's, which has usage in the last event alone.
    first = {**head, "usage": None} if request.include_usage else head

    def write(index: int, output: SequenceOutput) -> list[bytes]:
        target = output.text
        if needs_all and text_format is not None:
            held[index] += output.text
            target = "" if output.finish_reason is None else text_format.extract_target(held[index])
        return [event({**first, "choices": [piece]}) for piece in choices.pieces(index, output, target)]

    for index in range(generation.num_texts):
        for choice in choices.opening(index):
            yield event({**first, "choices": [choice]})
    async for one in generation.outputs():
        if one is None:
            yield KEEP_ALIVE
            continue
        # Decoding a long prompt's likeliest tokens takes seconds.
        for piece in await run_in_threadpool(write, *one) if one[1].prompt_tokens else write(*one):
            yield piece
    if request.include_usage:
        yield event({**head, "choices": [], "usage": generation.usage()})
    yield DONE
