"""The text of a request -> token ids, in the text format that the prefix was trained with.

Tokenizers run in one thread.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from prefixtune.data.chat import Source, as_conversation, encode_chat, end_ids, has_chat_template
from prefixtune.data.encoding import encode_prompts
from prefixtune.data.truncation import truncate_prompt
from prefixtune.errors import ConfigError, RequestError
from prefixtune.inference.prompts import newline_tokens
from prefixtune.prefix.text_format import TextFormat
from prefixtune.sampling.grammar import Grammar, compile_json_schema
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.api.generation import Generation, start_generation
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.api.streaming import run_in_time
from prefixtune.server.catalog import ServedModel
from prefixtune.server.responses import bad_request, unavailable
from prefixtune.server.task_schema import task_decoding

_AS_IT_IS = TextFormat("{source}", "{target}")
_CUT_HEADER = "x-prefixtune-cut-tokens"
"""Tokens of sources that were cut off because they did not fit; of one that is far too long, at least so many."""
_DROPPED_HEADER = "x-prefixtune-dropped-messages"
"""Messages of a chat that were dropped because the prefix reads one text."""

Ids = tuple[int, ...]
T = TypeVar("T")


async def tokenize(context: RequestContext, work: Callable[[], T]) -> T:
    """Run work on one text in the tokenizer's thread: a long text must not block streams.

    Raises:
        ApiError: The request's time is over, or the server has stopped.
        ClientDisconnect: The client disconnected.
    """
    if context.state.closed:
        raise unavailable("the server is shutting down.", "draining", retry_after=5)
    working = asyncio.get_running_loop().run_in_executor(context.state.tokenizer_thread, work)
    return await run_in_time(context, working)


async def decode_prompts(context: RequestContext, prompts: Sequence[Ids]) -> list[str]:
    """Prompts as the model reads them, special tokens included."""
    decode = partial(context.state.backbone.tokenizer.decode, clean_up_tokenization_spaces=False)
    return await tokenize(context, lambda: [str(decode(list(prompt))) for prompt in prompts])


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
        ApiError: A source is too long or cannot be written, or the engine takes no request now.
    """
    backbone, config, lacks = context.state.backbone, context.state.config, context.state.worker.lacks
    defaults = {} if text_format is None else task_decoding(model.header)
    task_length = min(defaults.get("max_new_tokens", config.default_max_tokens), config.max_tokens)
    length = task_length if request.length is None else request.length
    changes: dict[str, Any] = {}
    if request.json_schema is None and "min_tokens" not in request.model_fields_set and "min_new_tokens" not in lacks:
        changes["min_new_tokens"] = min(defaults.get("min_new_tokens", 0), length)
    if defaults.get("ban_newlines"):
        # Takes a while the first time, and is cached.
        changes["banned"] = tuple(await tokenize(context, partial(newline_tokens, backbone)))
    prompts = [await _encode(context, model, text_format, source, length) for source in sources]
    if isinstance(sources[0], list) or (text_format is not None and text_format.is_chat):
        changes["end_ids"] = await tokenize(context, partial(end_ids, backbone, text_format))
    return await start_generation(
        context,
        model,
        prompts,
        request.sampling(config).replace(**changes),
        n=n,
        default_max_tokens=task_length if request.length is None else None,
        verbatim=verbatim or text_format is None,
        grammar=await _compile_grammar(context, request),
    )


async def _encode(
    context: RequestContext, model: ServedModel, text_format: TextFormat | None, source: Source | Ids, length: int
) -> Ids:
    """Token ids of a source; one that is too long for its prefix is treated as in training."""
    if isinstance(source, tuple):
        return source
    backbone, positions = context.state.backbone, context.state.worker.max_length
    param = "prompt" if isinstance(source, str) else "messages"

    def encode() -> tuple[list[int], int]:
        try:
            if text_format is None and not isinstance(source, str):
                if not has_chat_template(backbone):
                    hint = "use /v1/completions, or /v1/tasks/ and the name of a prefix."
                    raise bad_request("the backbone has no chat template.", param, "no_chat_template", hint=hint)
                return encode_chat(backbone, as_conversation(source), positions=positions), 0
            whole = encode_prompts(backbone, form, [source], positions=positions)[0]
        except RequestError as error:
            raise bad_request(error.message, param, hint=error.hint) from None
        if text_format is None:
            return whole, 0
        room = {"prefix_length": model.prefix_length, "new_tokens": length, "positions": positions}
        ids = truncate_prompt(backbone, form, whole, **room, name="the prompt", source=source)
        return ids, len(whole) - len(ids)

    form = _AS_IT_IS if text_format is None else text_format.with_lengths(on_too_long=context.state.config.on_too_long)
    try:
        ids, num_cut = await tokenize(context, encode)
    except RequestError as error:
        raise bad_request(error.message, "prompt", "context_length_exceeded", hint=error.hint) from None
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
    backbone, param = context.state.worker.backbone, "response_format"
    try:
        return await tokenize(context, partial(compile_json_schema, backbone, request.json_schema))
    except RequestError as error:
        raise bad_request(error.message, param, "invalid_schema", hint=error.hint) from None
    except ConfigError as error:
        message = f"{param} is not supported here: {error.message}"
        raise bad_request(message, param, "unsupported_field", hint=f"on the server, {error.hint}") from None
