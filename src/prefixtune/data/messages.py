"""A conversation of a data file -> messages: OpenAI's form (`role`, `content`) and ShareGPT's (`from`, `value`).

Texts stay as they are, white space included. What is no text (tools, images, sounds) is refused by name, and so is what
asks for another training than that of every answer: thoughts beside the text, weights, answers not to be learned.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from prefixtune.data.examples import Message, check_messages
from prefixtune.errors import DataError, describe_value, did_you_mean, short_repr

__all__ = ["parse_messages", "split_answer", "unused_keys"]

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
_TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
_HINT = 'write {"role": "user", "content": "..."}.'
_NO_TOOLS = "leave such conversations out: calls of tools are not learned here."
_REFUSED = {
    **dict.fromkeys(("tool_calls", "function_call"), ("calls a tool", _NO_TOOLS)),
    **dict.fromkeys(
        ("reasoning_content", "reasoning", "thinking"),
        ("has a thought beside its text", "write it into the text, as the model's template does, or leave it out."),
    ),
    **dict.fromkeys(
        ("images", "image", "audio", "audios", "video", "videos"),
        ("holds more than text", "leave such conversations out, or the key."),
    ),
}
"""Keys that are refused where they are filled -> what the message does, and the way out."""
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
            raise DataError(f"{location}: {column!r} is not JSON: {value[:40]!r}...", hint=_HINT) from None
    if not isinstance(value, list | tuple) or not value:
        kind = "nothing (null)" if value is None else "an empty list" if value == [] else describe_value(value)
        raise DataError(f"{location}: {column!r} is {kind}; a list of messages is needed.", hint=_HINT)
    return [
        _parse_message(message, f"{location}: message {number} of {column!r}")
        for number, message in enumerate(value, start=1)
    ]


def unused_keys(value: Any) -> list[str]:
    """The filled keys of a list of messages that are not read, in order; none, if it is something else.

    >>> unused_keys([{"role": "user", "content": "Hi", "name": "Ann", "refusal": None}])
    ['name']
    """
    messages = [message for message in value if isinstance(message, Mapping)] if isinstance(value, list | tuple) else []
    known = {"role", "content", "from", "value", *_REFUSED, *_LEARNED}
    keys = (str(key) for message in messages for key, item in message.items() if item not in (None, "", [], {}))
    return [key for key in dict.fromkeys(keys) if key not in known]


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
    last = messages[-1]
    before, answers = (messages[:-1], (last.content,)) if last.role == "assistant" else (messages, ())
    try:
        checked = check_messages(before, "the conversation")
    except DataError as error:
        raise DataError(f"{location}: {error.message}", hint=error.hint) from None
    if needs_answer and not answers:
        raise DataError(
            f"{location}: the conversation ends with the user's turn, so there is no answer to learn.",
            hint="add the assistant's answer, or drop the last turn.",
        )
    return checked, answers


def _parse_message(message: Any, name: str) -> Message:
    if isinstance(message, Message):
        message = message._asdict()
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is {describe_value(message)}, not an object.", hint=_HINT)
    keys = ("role", "content") if "role" in message or "from" not in message else ("from", "value")
    missing = [key for key in keys if key not in message and not (key == "content" and message.get("tool_calls"))]
    if missing:
        names = ", ".join(str(key)[:40] for key in list(message)[:9]) or "none"
        raise DataError(f"{name} has no {missing[0]!r}; its keys are: {names}.", hint=_HINT)
    written, content = message[keys[0]], message.get(keys[1])
    word = written.lower() if isinstance(written, str) else ""
    if word in _TOOLS:
        raise DataError(f"{name} has the role {written!r}; system, user and assistant are read.", hint=_NO_TOOLS)
    for key, (what, hint) in _REFUSED.items():
        if message.get(key):
            raise DataError(f"{name} {what} ({key}); only texts are read.", hint=hint)
    if word not in _ROLES:
        known = ", ".join(_ROLES)
        hint = did_you_mean(word, _ROLES) if word else f"known: {known}."
        raise DataError(f"{name} has the role {describe_role(written)}, which is not known.", hint=hint)
    role: Any = _ROLES[word]
    for key, learned in _LEARNED.items():
        if role == "assistant" and message.get(key) not in (None, learned):
            raise DataError(
                f"{name} has the {key} {short_repr(message[key])}; every turn of the assistant is learned alike here.",
                hint="end the conversation before it, or leave the key out.",
            )
    text = content if isinstance(content, str) else _join_parts(content, name)
    if not text.strip():
        raise DataError(f"{name} is empty.", hint="write its text, or leave the conversation out.")
    return Message(role, text)


def describe_role(role: Any) -> str:
    """A role as messages show it."""
    return repr(role[:40]) if isinstance(role, str) else describe_value(role)


def _join_parts(content: Any, name: str) -> str:
    """The text of a list of parts, as OpenAI's clients write them: `[{"type": "text", "text": "..."}]`."""
    if not isinstance(content, list):
        raise DataError(f"{name} has {describe_value(content)} as content, not a text.", hint=_HINT)
    texts = []
    for part in content:
        if isinstance(part, str):
            texts.append(part)
            continue
        kind = part.get("type", "text") if isinstance(part, Mapping) else None
        if kind not in ("text", "input_text", "output_text"):
            what = f"a part of type {describe_role(kind)}" if kind is not None else describe_value(part)
            raise DataError(
                f"{name} holds {what}; only text is read.",
                hint='leave such conversations out; a part of text is {"type": "text", "text": "..."}.',
            )
        text = part.get("text")
        if not isinstance(text, str):
            raise DataError(f"{name} has a part whose text is {describe_value(text)}.", hint=_HINT)
        texts.append(text)
    return "".join(texts)
