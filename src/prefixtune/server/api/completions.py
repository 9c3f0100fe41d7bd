"""OpenAI's `/v1/completions` and `/v1/chat/completions`, whole and as streams.

With a prefix, a prompt or a chat's last message is a source: it is put into the text format that the prefix was trained
with, and the response is the target alone. Where that format has a chat template, all messages of a chat are written by
it, and a prompt is one user message. Otherwise (the bare backbone, token ids, `raw_completions`, a prefix whose
file has no format) a prompt goes to the model as it is, and a chat in the backbone's own template; the response is what
the model generated, white space around it included.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator
from functools import partial

from fastapi import Response
from fastapi.concurrency import run_in_threadpool

from prefixtune.engine.request import SequenceOutput
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.server.api.choices import ChatChoices, CompletionChoices
from prefixtune.server.api.endpoint import GenerationContext, RequestContext, key_router
from prefixtune.server.api.generation import Generation
from prefixtune.server.api.openai_protocol import ChatRequest, CompletionRequest, OpenAIRequest
from prefixtune.server.api.prompting import chat_source, decode_prompts, start_texts
from prefixtune.server.api.streaming import DONE, KEEP_ALIVE, event, event_stream
from prefixtune.server.catalog import ServedModel
from prefixtune.server.responses import JsonAnswer
from prefixtune.server.target_stream import TargetStream

Choices = CompletionChoices | ChatChoices
router = key_router()


@router.post("/v1/completions", name="complete")
async def create_completion(request: CompletionRequest, context: GenerationContext) -> Response:
    """Continue a prompt."""
    state, prompts, echo = context.state, request.prompts, request.echo
    model = await _load(context, request)
    if state.config.log_prompts:
        context.log_fields["prompts"] = prompts
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    raw = state.config.raw_completions or not texts
    text_format = None if raw else read_text_format(model.header)
    generation = await start_texts(context, request, model, text_format, prompts, request.n, verbatim=echo)
    if not echo:
        return await _respond(context, request, generation, CompletionChoices(state.backbone, text_format), text_format)
    # What the model read, and what it generated, both as they are.
    read = [one.prompt for one in generation.requests]
    prompt_texts = texts if raw and texts else await decode_prompts(context, read)
    choices = CompletionChoices(state.backbone, None, prompt_texts, request.n)
    return await _respond(context, request, generation, choices)


@router.post("/v1/chat/completions", name="chat")
async def create_chat_completion(request: ChatRequest, context: GenerationContext) -> Response:
    """Answer a chat, in the prefix's text format or the backbone's chat template."""
    state, conversation = context.state, request.conversation
    model = await _load(context, request)
    if state.config.log_prompts:
        context.log_fields["messages"] = conversation
    text_format = read_text_format(model.header)
    source = conversation if text_format is None else chat_source(context, conversation, text_format)
    generation = await start_texts(context, request, model, text_format, [source], request.n)
    return await _respond(context, request, generation, ChatChoices(state.backbone), text_format)


async def _load(context: RequestContext, request: OpenAIRequest) -> ServedModel:
    """The requested model, once the request is checked and counted."""
    request.check(context.state.config)
    context.admit(request.num_prompts * request.n)
    return await run_in_threadpool(context.state.catalog.load, request.model, context.caller, request.prefixes)


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
    texts = [""] * generation.num_texts

    async def events() -> AsyncGenerator[bytes]:
        targets = [] if text_format is None else [TargetStream(text_format) for _ in texts]
        # As OpenAI's, which has usage in the last event alone.
        first = {**head, "usage": None} if request.include_usage else head

        def write(index: int, output: SequenceOutput, target: str) -> list[bytes]:
            return [event({**first, "choices": [piece]}) for piece in choices.pieces(index, output, target)]

        for index in range(generation.num_texts):
            for choice in choices.opening(index):
                yield event({**first, "choices": [choice]})
        async for one in generation.outputs():
            if one is None:
                yield KEEP_ALIVE
                continue
            index, output = one
            target = output.text
            if targets:
                target = targets[index].add(target, last=output.finish_reason is not None)
            # As far as they get: the client may disconnect.
            texts[index] += target
            # Decoding a long prompt's likeliest tokens takes seconds.
            written = partial(write, index, output, target)
            for piece in await run_in_threadpool(written) if output.prompt_tokens else written():
                yield piece
        if request.include_usage:
            yield event({**head, "choices": [], "usage": generation.usage()})
        yield DONE

    if context.state.config.log_prompts:
        context.log_fields["outputs"] = texts
    if request.stream:
        return event_stream(context, events())
    outputs = await generation.collect()
    texts[:] = [output.text if text_format is None else text_format.extract_target(output.text) for output in outputs]

    def respond() -> Response:
        whole = [choices.whole(index, *pair) for index, pair in enumerate(zip(outputs, texts, strict=True))]
        return JsonAnswer({**head, "choices": whole, "usage": generation.usage()}, headers=context.headers)

    # Decoding the likeliest tokens of thousands of positions takes seconds.
    has_logprobs = generation.requests[0].sampling.logprobs is not None
    return await run_in_threadpool(respond) if has_logprobs else respond()
