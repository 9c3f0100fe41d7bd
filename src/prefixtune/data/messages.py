"""A conversation of a data file -> messages: OpenAI's form (`role`, `content`) and ShareGPT's (`from`, `value`).

Texts stay as they are, white space included. What is no text (tools, images, sounds) is refused by name, and so is what
asks for another training than that of every answer: thoughts beside the text, weights, answers not to be learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefixtune.data.examples import Message, check_messages
from prefixtune.errors import DataError, describe_value, short_repr

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}
"""Role in a file, in lower case -> the role that it is here."""
_HINT = 'write {"role": "user", "content": "..."}.'
_REFUSED = {
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "audios", "video", "videos"),
}
"""Keys that are refused where they are filled: what is beside the text."""
_LEARNED = {"weight": 1, "train": True, "loss": True}
"""Keys of a message of the assistant -> their value where it is learned as here; other values are refused."""


def parse_messages(value: Any, column: str, location: str) -> list[Message]:
    """The messages of one conversation, in their order, which is not checked.

    >>> parse_messages([{"from": "human", "value": "Hi"}], "conversations", "a.json, item 1")
    [Message(role='user', content='Hi')]

    Args:
        value: A list of objects, or its JSON, as a cell of a table holds it.
        column: Its column, for messages.
        location: The row's, for messages.

    Raises:
        DataError: It is no list of messages, a role is unknown, a message is empty, or it holds what is no text.
    """
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise DataError(f"{location}: {column!r} is not JSON: {short_repr(value)}.", hint=_HINT) from None
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{location}: {column!r} is {short_repr(value)}; a list of messages is needed.", hint=_HINT)
    return [
        _parse_message(message, f"{location}: message {number} of {column!r}")
        for number, message in enumerate(value, start=1)
    ]


def split_answer(
    messages: list[Message], location: str, *, needs_answer: bool
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The messages before the last answer, and the answer; no answer, if the user's turn is the last.

    Args:
        messages: As `parse_messages` gives them.
        location: The row's, for messages of errors.
        needs_answer: A conversation that ends with the user's turn is refused.

    Raises:
        DataError: The roles are in a wrong order, or there is no answer.
    """
    answers = (messages[-1].content,) if messages[-1].role == "assistant" else ()
    before = check_messages(messages[: len(messages) - len(answers)], f"{location}: the conversation")
    if needs_answer and not answers:
        raise DataError(
            f"{location}: the conversation ends with the user's turn, so there is no answer to learn.",
            hint="add the assistant's answer, or drop the last turn.",
        )
    return before, answers


def _parse_message(message: Any, name: str) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is {describe_value(message)}, not an object.", hint=_HINT)
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    written, content = map(message.get, names)
    role: Any = _ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise DataError(
            f"{name} has the role {short_repr(written)}, which is not known.", hint=f"known: {', '.join(_ROLES)}."
        )
    for key, value in message.items():
        is_beside = key in _REFUSED and value
        if is_beside or (role == "assistant" and key in _LEARNED and value not in (None, _LEARNED[key])):
            raise DataError(
                f"{name} has the {key} {short_repr(value)}; only texts are read, and every answer is learned alike.",
                hint="leave such conversations out, or the key.",
            )
    # OpenAI's clients write a list of parts: `[{"type": "text", "text": "..."}]`.
    parts = [_text_of(part, name) for part in content] if isinstance(content, list) else [_text_of(content, name)]
    if not "".join(parts).strip():
        raise DataError(f"{name} is empty.", hint="write its text, or leave the conversation out.")
    return Message(role, "".join(parts))


def _text_of(part: Any, name: str) -> str:
    """The text of a message's content, or of a part of it."""
    text = part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = part.get("text")
    if not isinstance(text, str):
        raise DataError(
            f"{name} holds {describe_value(part)}; only text is read.",
            hint='leave such conversations out; a part of text is {"type": "text", "text": "..."}.',
        )
    return text
