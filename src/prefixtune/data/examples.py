"""An example: a source with all its targets, as every task produces it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from pydantic_core import from_json

from prefixtune.errors import DataError, describe_value, short_repr

TaskKind = Literal["generation", "classification", "tagging"]
"""What a target is: a text, one label, or one tag per token with a space between. It decides how outputs are scored."""
SplitName = Literal["train", "dev", "test"]
"""A part of a data set."""
Role = Literal["system", "user", "assistant"]
"""Who speaks in a conversation."""
_NAMES_OF = {
    "system": ("system", "developer"),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "model", "bot"),
}
_ROLES = {name: role for role, names in _NAMES_OF.items() for name in names}
"""Role in a file, in lower case -> the role that it is here."""
_HINT = 'write {"role": "user", "content": "..."}.'
_REFUSED = {
    *("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking"),
    *("images", "image", "audio", "audios", "video", "videos"),
}
"""Keys that are refused where they are filled: what is beside the text."""
_LEARNED = {"weight": 1, "train": True, "loss": True}
"""Keys of a message of the assistant -> their value where it is learned as here; other values are refused."""


class Message(NamedTuple):
    """One message of a conversation."""

    role: Role
    content: str


def check_messages(messages: Any, name: str = "the conversation") -> tuple[Message, ...]:
    """The messages before an answer: perhaps one of the system, then the user's and the assistant's in turns.

    >>> check_messages([{"role": "user", "content": "Hi"}])
    (Message(role='user', content='Hi'),)

    Args:
        messages: Each a `Message`, a pair, or a dict of its fields.
        name: What messages of errors call them.

    Raises:
        DataError: They are no such messages, a role comes where another must, one is empty, or the last one is not the
            user's.
    """
    is_list = isinstance(messages, Sequence) and not isinstance(messages, str | bytes)
    checked = [_as_message(one, f"{name}: message {n}") for n, one in enumerate(messages, 1)] if is_list else []
    first = 1 if checked and checked[0].role == "system" else 0
    for number, message in enumerate(checked[first:]):
        if message.role != ("user", "assistant")[number % 2]:
            raise _wrong_messages(f"{name}: message {first + number + 1} is the {message.role}'s", "the other's")
    if not checked or checked[-1].role != "user":
        ends = f"ends with the {checked[-1].role}'s message" if checked else f"is {short_repr(messages)}"
        raise _wrong_messages(f"{name} {ends}", "messages that end with the user's")
    return tuple(checked)


def _wrong_messages(what: str, needed: str) -> DataError:
    return DataError(f"{what}, but must be {needed}.", hint='write {"role": "user", "content": "..."}, in turns.')


def parse_messages(value: Any, column: str, location: str) -> list[Message]:
    """The messages of one conversation of a file, in their order, which is not checked.

    Both OpenAI's form (`role`, `content`) and ShareGPT's (`from`, `value`) are read; texts keep their white space. What
    is no text (tools, images, sounds) is refused by name, and so is what asks for another training than that of every
    answer: thoughts beside the text, weights, answers not to be learned.

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
            value = from_json(value)
        except ValueError:
            raise DataError(f"{location}: {column!r} is not JSON: {short_repr(value)}.", hint=_HINT) from None
    if not isinstance(value, list | tuple) or not value:
        raise DataError(f"{location}: {column!r} is {short_repr(value)}; a list of messages is needed.", hint=_HINT)
    return [
        _as_message(message, f"{location}: message {number} of {column!r}")
        for number, message in enumerate(value, start=1)
    ]


def _as_message(message: Any, name: str) -> Message:
    if isinstance(message, tuple | list) and len(message) == 2:
        message = dict(zip(Message._fields, message, strict=True))
    if not isinstance(message, Mapping):
        raise DataError(f"{name} is {describe_value(message)}, not an object.", hint=_HINT)
    names = ("from", "value") if "role" not in message and "from" in message else ("role", "content")
    written, content = map(message.get, names)
    role: Any = _ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise DataError(f"{name} has the unknown role {short_repr(written)}.", hint=f"known: {', '.join(_ROLES)}.")
    for key, value in message.items():
        is_beside = key in _REFUSED and value
        if is_beside or (role == "assistant" and key in _LEARNED and value not in (None, _LEARNED[key])):
            what = f"{name} has the {key} {short_repr(value)}; only texts are read, and every answer is learned alike."
            raise DataError(what, hint="leave such conversations out, or the key.")
    # OpenAI's clients write a list of parts: `[{"type": "text", "text": "..."}]`.
    parts = [_part_text(part, name) for part in content] if isinstance(content, list) else [_part_text(content, name)]
    if not "".join(parts).strip():
        raise DataError(f"{name} is empty.", hint="write its text, or leave the conversation out.")
    return Message(role, "".join(parts))


def _part_text(part: Any, name: str) -> str:
    """The text of a message's content, or of a part of it."""
    text = part
    if isinstance(part, Mapping) and part.get("type", "text") in ("text", "input_text", "output_text"):
        text = part.get("text")
    if not isinstance(text, str):
        what = f"{name} holds {short_repr(part)}; only text is read."
        raise DataError(what, hint='leave such conversations out; a part of text is {"type": "text", "text": "..."}.')
    return text


@dataclass(frozen=True)
class Example:
    """One source and all its targets (references).

    Attributes:
        source: The linearized input, as the model reads it, without separators.
        targets: The wanted outputs, or the only one; empty if the example is only for generation.
        fields: The record that the source was made from, for reports and templates.
        groups: How scores are grouped: the name of a grouping -> this example's group, as in `{"category": "Food"}`.
        messages: Of a conversation: all messages before the targets. The last one is the user's, and `source` is its
            text; the targets are the assistant's answers to it. Earlier answers among the messages are trained on too.
            Empty: the example is no chat.

    Raises:
        DataError: Source, targets or groups are not texts, or the messages are no conversation (see `check_messages`).
    """

    source: str
    targets: Sequence[str] = ()
    fields: Mapping[str, Any] = field(default_factory=dict, compare=False)
    groups: Mapping[str, str] = field(default_factory=dict, compare=False)
    messages: Sequence[Message] = ()

    def __post_init__(self) -> None:
        # As a sequence, a single text would be one target per character.
        targets = (self.targets,) if isinstance(self.targets, str) else self.targets
        targets = tuple(targets) if isinstance(targets, Sequence) else (None,)
        if not all(isinstance(text, str) for text in (self.source, *targets)):
            what = f"the source {short_repr(self.source)} or a target of {short_repr(self.targets)} is no text."
            raise DataError(what, hint='write Example("source", ("target",)).')
        if not isinstance(self.groups, Mapping) or not all(isinstance(group, str) for group in self.groups.values()):
            what = f"the groups of {short_repr(self.source)} are {short_repr(self.groups)}, not a dict of texts."
            raise DataError(what, hint='write groups={"category": "Food"}.')
        object.__setattr__(self, "targets", targets)
        object.__setattr__(self, "messages", check_messages(self.messages) if self.messages else ())


def chat_example(messages: Any, name: str = "the conversation", **fields: Any) -> Example:
    """The example of a whole conversation, whose last answer is the target.

    >>> example = chat_example([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}])
    >>> example.source, example.targets, len(example.messages)
    ('Hi', ('Hello.',), 1)

    Args:
        messages: As for `check_messages`, with the assistant's as the last one; with the user's there is no target.
        name: What messages of errors call them.
        **fields: Other fields of the example.

    Raises:
        DataError: They are no such messages.
    """
    answers: tuple[str, ...] = ()
    if isinstance(messages, Sequence) and len(messages) > 1:
        *before, last = messages
        if (answer := _as_message(last, f"{name}: message {len(messages)}")).role == "assistant":
            messages, answers = before, (answer.content,)
    checked = check_messages(messages, name)
    return Example(checked[-1].content, answers, messages=checked, **fields)


ExampleLike = Example | Mapping[str, Any]
"""An example, or a dict of its fields."""


def references_of(example: Example, protocol: str) -> list[str]:
    """The texts that an output is scored against: the targets; for DART the official scorer's, if the file has them."""
    official = example.fields.get("official_references") if protocol == "dart" else None
    return list(official or example.targets)


def conversation_of(example: Example) -> Sequence[Message]:
    """The messages of an example; where it has none, its source is the user's.

    >>> conversation_of(Example("Hi"))
    (Message(role='user', content='Hi'),)
    """
    return example.messages or (Message("user", example.source),)


def source_key(example: Example) -> tuple[str, Sequence[Message]] | None:
    """Equal for examples of one source: the same text, after the same messages; None: it has none, and is its own."""
    return (example.source, example.messages) if example.source else None


def merge_examples(examples: Iterable[Example]) -> list[Example]:
    """One example for each source of one turn, in order of first appearance, with all its targets in order.

    A conversation of several turns, and a text, stays as it is.

    >>> [e.targets for e in merge_examples([Example("a", ("1",)), Example("b", ("2",)), Example("a", ("3",))])]
    [('1', '3'), ('2',)]
    """
    alike: dict[Any, list[Example]] = {}
    for number, example in enumerate(examples):
        has_turns = any(message.role == "assistant" for message in example.messages)
        alike.setdefault(number if has_turns else source_key(example) or number, []).append(example)
    return [
        replace(same[0], targets=[target for one in same for target in one.targets]) if same[1:] else same[0]
        for same in alike.values()
    ]


def limit_targets(examples: Sequence[Example], limit: int) -> list[Example]:
    """The first `limit` targets, with their sources; 0: all of them.

    >>> [e.targets for e in limit_targets([Example("a", ("1", "2")), Example("b", ("3",))], 1)]
    [('1',)]
    """
    if not limit:
        return list(examples)
    kept: list[Example] = []
    room = limit
    for example in examples:
        if room <= 0:
            break
        kept.append(replace(example, targets=example.targets[:room]))
        room -= len(example.targets)
    return kept


def has_messages(examples: Iterable[Example]) -> bool:
    """Whether some example has messages."""
    return any(example.messages for example in examples)


def source_ids(examples: Iterable[Example]) -> list[int]:
    """A number for each example; examples of one source have the same."""
    ids: dict[Any, int] = {}
    keys = (source_key(example) or number for number, example in enumerate(examples))
    return [ids.setdefault(key, len(ids)) for key in keys]


def distinct_sources(examples: Sequence[Example]) -> list[int]:
    """The index of the first example with a target of each source that has one, in order."""
    first: dict[int, int] = {}
    for index, (example, source) in enumerate(zip(examples, source_ids(examples), strict=True)):
        if example.targets:
            first.setdefault(source, index)
    return list(first.values())
