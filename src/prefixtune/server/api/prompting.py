"""Text that is asked for under a prefix's name, in the text format that the prefix was trained with.

Shared by all endpoints that write text. Knows nothing of the shapes of requests and replies.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from prefixtune.data.encoding import encode_prompts
from prefixtune.data.truncation import truncate_prompt
from prefixtune.errors import RequestError
from prefixtune.inference.decoding import newline_tokens
from prefixtune.prefix.text_format import TextFormat
from prefixtune.server.api.endpoint import Call
from prefixtune.server.api.generation import encode
from prefixtune.server.api.protocol import GenerationRequest
from prefixtune.server.models.catalog import Served
from prefixtune.server.models.task_schema import decoding_of
from prefixtune.server.responses import bad_request

__all__ = ["CUT_HEADER", "DROPPED_HEADER", "encode_source", "source_of_chat", "with_customs"]


CUT_HEADER = "x-prefixtune-cut-tokens"
"""Tokens of sources that were cut off, since they did not fit."""
DROPPED_HEADER = "x-prefixtune-dropped-messages"
"""Messages of a chat that were dropped, since the prefix's text format cannot carry them."""


async def encode_source(
    call: Call, served: Served, text_format: TextFormat, source: str, new_tokens: int
) -> tuple[int, ...]:
    """Token ids of a source within a text format; one that is too long is treated as in training.

    Args:
        call: The call; its log and its reply's headers say how much was cut.
        served: With which prefix.
        text_format: Of the prefix.
        source: As in training.
        new_tokens: Most tokens that are to be generated.

    Raises:
        ApiError: It is longer than the training allowed, and not to be cut.
    """
    backbone, config = call.services.backbone, call.services.config
    chosen = text_format.with_lengths(on_too_long=config.on_too_long)
    room = {"prefix_length": served.prefix_length, "positions": call.services.engine.max_length}
    whole: list[int] = []

    def work() -> list[int]:
        whole.extend(encode_prompts(backbone, chosen, [source])[0])
        return truncate_prompt(backbone, chosen, whole, new_tokens=new_tokens, name="the prompt", **room)

    try:
        ids = await encode(call, work)
    except RequestError as error:
        raise bad_request(error.message, "prompt", "context_length_exceeded", hint=error.hint) from None
    if len(ids) < len(whole):
        call.facts["cut_tokens"] = call.facts.get("cut_tokens", 0) + len(whole) - len(ids)
        call.headers[CUT_HEADER] = str(call.facts["cut_tokens"])
    return ids


def source_of_chat(call: Call, messages: Sequence[dict[str, str]]) -> str:
    """The source of a chat with a prefix: its last message, which must be the user's.

    Raises:
        ApiError: It is another's, or others stand before it and the server does not drop them.
    """
    last, others = messages[-1], len(messages) - 1
    if last["role"] != "user":
        raise bad_request(f"the last message is of role {last['role']!r}, but must be the user's.", "messages")
    if not last["content"].strip():
        raise bad_request("the last message is empty; some text is needed.", "messages")
    if others and call.services.config.earlier_messages == "refuse":
        raise bad_request(
            f"this prefix reads one text, but the chat has {len(messages)} messages.",
            "messages",
            "messages_not_carried",
            hint="send the last user message alone, or have the server drop the others (earlier_messages = 'drop').",
        )
    if others:
        call.facts["dropped_messages"] = others
        call.headers[DROPPED_HEADER] = str(others)
    return last["content"]


async def with_customs(call: Call, ask: GenerationRequest, served: Served) -> tuple[GenerationRequest, int]:
    """The ask with what is customary for the task, where it says nothing itself; and the customary length."""
    customs, config = decoding_of(served.header), call.services.config
    length = min(customs.get("max_new_tokens", config.default_max_tokens), config.max_tokens)
    most = ask.sampling.max_new_tokens if ask.says_length else length
    changes: dict[str, Any] = {}
    if "min_tokens" not in ask.given:
        changes["min_new_tokens"] = min(customs.get("min_new_tokens", 0), most)
    if customs.get("ban_newlines"):
        # Kept after the first time, which takes a while.
        banned = await asyncio.get_running_loop().run_in_executor(
            call.services.tokenizing, newline_tokens, call.services.backbone
        )
        changes["banned"] = tuple(banned)
    return replace(ask, sampling=replace(ask.sampling, **changes)), length
