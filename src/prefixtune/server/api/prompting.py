"""The text of a request -> token ids, in the text format that the prefix was trained with.

Tokenizers run in one thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import chat
from prefixtune.data.chat import Source, end_ids
from prefixtune.data.encoding import encode_prompts
from prefixtune.data.truncation import truncate_prompt
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.prompts import newline_tokens
from prefixtune.prefix.text_format import TextFormat
from prefixtune.sampling.grammar import Grammar, compile_json_schema
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.generation import Generation, deadline_exceeded, start_generation
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.api.streaming import run_until_disconnect
from prefixtune.server.models.catalog import ServedModel
from prefixtune.server.models.task_schema import task_decoding
from prefixtune.server.responses import bad_request, unavailable

__all__ = [
    "chat_source",
    "compile_grammar",
    "decode_prompts",
    "encode_chat",
    "encode_text",
    "start_targets",
    "tokenize",
]


_AS_IT_IS = TextFormat("{source}", "{target}")
_CUT_HEADER = "x-prefixtune-cut-tokens"
"""Tokens of sources that were cut off because they did not fit; of one that is far too long, at least so many."""
_DROPPED_HEADER = "x-prefixtune-dropped-messages"
"""Messages of a chat that were dropped because the prefix reads one text."""

T = TypeVar("T")


async def tokenize(context: RequestContext, work: Callable[[], T]) -> T:
    """Run work on one text in the tokenizer's thread: a long text must not block streams.

    Raises:
        ApiError: The request's time is over, or the server has stopped.
        ClientDisconnect: The client disconnected.
    """
    state = context.state
    if state.closed:
        raise unavailable("the server is shutting down.", "draining", retry_after=5)
    working = asyncio.get_running_loop().run_in_executor(state.tokenizer_thread, work)
    try:
        async with asyncio.timeout(context.remaining):
            return await run_until_disconnect(context.request.receive, working)
    except TimeoutError:
        raise deadline_exceeded(context) from None


async def encode_text(context: RequestContext, text: str) -> tuple[int, ...]:
    """Token ids of a text as it is; of one that cannot fit, enough to refuse it."""
    backbone, positions = context.state.backbone, context.state.worker.max_length
    return tuple(await tokenize(context, lambda: encode_prompts(backbone, _AS_IT_IS, [text], positions=positions)[0]))


async def decode_prompts(context: RequestContext, prompts: Sequence[tuple[int, ...]]) -> list[str]:
    """Prompts as the model reads them, special tokens included."""
    decode = partial(context.state.backbone.tokenizer.decode, clean_up_tokenization_spaces=False)
    return await tokenize(context, lambda: [str(decode(list(prompt))) for prompt in prompts])


async def encode_chat(
    context: RequestContext, messages: Sequence[dict[str, str]]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of a chat in the backbone's own template, and the tokens that end an answer there.

    Raises:
        ApiError: The backbone has no chat template, or it refuses the messages.
    """
    state = context.state
    return await tokenize(
        context, partial(_apply_chat_template, state.backbone, messages, positions=state.worker.max_length)
    )


def _apply_chat_template(
    backbone: Backbone, messages: Sequence[dict[str, str]], *, positions: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if not chat.has_chat_template(backbone):
        raise bad_request(
            "the backbone has no chat template.",
            "messages",
            "no_chat_template",
            hint="use /v1/completions, or /v1/tasks/ and the name of a prefix.",
        )
    try:
        return tuple(chat.encode_chat(backbone, messages, positions=positions)), end_ids(backbone)
    except RequestError as error:
        raise bad_request(error.message, "messages") from None


async def _encode_source(
    context: RequestContext, model: ServedModel, text_format: TextFormat, source: Source, max_new_tokens: int
) -> tuple[int, ...]:
    """Token ids of a source, or of a conversation, in a text format; one that is too long is treated as in training.

    Args:
        context: The request; its log line and response headers say how much was cut.
        model: With which prefix.
        text_format: Of the prefix.
        source: As in training.
        max_new_tokens: Most tokens to generate.

    Raises:
        ApiError: It is longer than in training, and must not be cut.
    """
    backbone, positions = context.state.backbone, context.state.worker.max_length
    text_format = text_format.with_lengths(on_too_long=context.state.config.on_too_long)

    def encode() -> tuple[list[int], int]:
        try:
            whole = encode_prompts(backbone, text_format, [source], positions=positions)[0]
        except RequestError as error:
            raise bad_request(error.message, "messages" if text_format.is_chat else "prompt", hint=error.hint) from None
        ids = truncate_prompt(
            backbone,
            text_format,
            whole,
            prefix_length=model.prefix_length,
            new_tokens=max_new_tokens,
            positions=positions,
            name="the prompt",
            source=source,
        )
        return ids, len(whole) - len(ids)

    try:
        ids, num_cut = await tokenize(context, encode)
    except RequestError as error:
        raise bad_request(error.message, "prompt", "context_length_exceeded", hint=error.hint) from None
    if num_cut > 0:
        context.log_fields["cut_tokens"] = context.log_fields.get("cut_tokens", 0) + num_cut
        context.headers[_CUT_HEADER] = str(context.log_fields["cut_tokens"])
    return tuple(ids)


def chat_source(context: RequestContext, messages: list[dict[str, str]], text_format: TextFormat) -> Source:
    """The source of a chat with a prefix: with a chat template all messages, else the last one; which is the user's.

    Raises:
        ApiError: It is not the user's; or there are earlier messages that the prefix cannot read, and the server does
            not drop them.
    """
    last, num_earlier = messages[-1], len(messages) - 1
    if last["role"] != "user":
        raise bad_request(f"the last message has the role {last['role']!r}, but must be the user's.", "messages")
    if not last["content"].strip():
        raise bad_request("the last message is empty; some text is needed.", "messages")
    if text_format.is_chat:
        return messages
    if num_earlier and context.state.config.earlier_messages == "refuse":
        raise bad_request(
            f"this prefix reads one text, but the chat has {len(messages)} messages.",
            "messages",
            "messages_not_carried",
            hint="send the last user message alone, or have the server drop the others (earlier_messages = 'drop').",
        )
    if num_earlier:
        context.log_fields["dropped_messages"] = num_earlier
        context.headers[_DROPPED_HEADER] = str(num_earlier)
    return last["content"]


async def start_targets(
    context: RequestContext,
    request: GenerationRequest,
    model: ServedModel,
    text_format: TextFormat,
    sources: Sequence[Source],
    n: int = 1,
    *,
    verbatim: bool = False,
) -> Generation:
    """Generate the targets of sources, with the decoding of the prefix's task where the request has none of its own.

    `verbatim` keeps the white space around the texts.

    Raises:
        ApiError: A source is too long, or the engine takes no request now.
    """
    defaults, config = task_decoding(model.header), context.state.config
    task_length = min(defaults.get("max_new_tokens", config.default_max_tokens), config.max_tokens)
    length = task_length if request.length is None else request.length
    changes: dict[str, Any] = {}
    if text_format.is_chat:
        changes["end_ids"] = await tokenize(context, partial(end_ids, context.state.backbone, text_format))
    lacks = context.state.worker.lacks
    if request.json_schema is None and "min_tokens" not in request.model_fields_set and "min_new_tokens" not in lacks:
        changes["min_new_tokens"] = min(defaults.get("min_new_tokens", 0), length)
    if defaults.get("ban_newlines"):
        # Takes a while the first time, and is cached.
        changes["banned"] = tuple(await tokenize(context, partial(newline_tokens, context.state.backbone)))
    sampling = request.sampling(context.state.limits).replace(**changes)
    prompts = [await _encode_source(context, model, text_format, source, length) for source in sources]
    default = task_length if request.length is None else None
    grammar = await compile_grammar(context, request)
    return start_generation(
        context, model, prompts, sampling, n=n, default_max_tokens=default, verbatim=verbatim, grammar=grammar
    )


async def compile_grammar(context: RequestContext, request: GenerationRequest) -> Grammar | None:
    """The grammar of a request's `response_format`, compiled outside the event loop; None: it has none.

    Raises:
        ApiError: The schema cannot be used, or this server lacks what is needed.
    """
    if request.json_schema is None:
        return None
    backbone, param = context.state.worker.backbone, "response_format"
    try:
        return await tokenize(context, partial(compile_json_schema, backbone, request.json_schema))
    except RequestError as error:
        raise bad_request(error.message, param, "invalid_schema", hint=error.hint) from None
    except ConfigError as error:
        hint = f"on the server, {error.hint}"
        raise bad_request(
            f"{param} is not supported here: {error.message}", param, "unsupported_field", hint=hint
        ) from None
