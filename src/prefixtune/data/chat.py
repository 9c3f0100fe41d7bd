"""Conversations -> token ids, by a chat template: what is read before an answer, and where the answers are labels.

A conversation is computed once: its answers are the turns of one packed example. Where the template writes earlier
answers in another way than the last one (thinking is removed), or tokens join at a border, each turn is an example of
its own.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.examples import Message
from prefixtune.errors import RequestError
from prefixtune.prefix.chat_format import allow_template, render_chat, split_at_last_message, template_hash
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat

Source = str | Sequence[Message] | Sequence[Mapping[str, str]]
"""What is answered: one user message's text, or all messages before the answer."""

_OWN = TextFormat("{source}", "{target}", chat_template=MODEL_TEMPLATE)
_ANSWER, _QUESTION = "\ue000answer\ue001", "\ue000question\ue001"
"""A text that stands for an answer; of characters for private use, which no template changes."""


class Turn(NamedTuple):
    """One answer of the assistant: the tokens before it, and its own up to where generation stops."""

    prompt: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions of both."""
        return len(self.prompt) + len(self.labels)


@dataclass(frozen=True)
class ConversationTurns:
    """The answers of a conversation.

    Attributes:
        turns: One per answer of the assistant; the last ones answer the same message where there are several targets.
            Where one is too long, it is the last of them.
        num_last: How many of them answer the last message.
        is_packed: Each turn continues the one before it token by token, so that the whole is computed once.
        num_turns: Of the whole conversation.
    """

    turns: tuple[Turn, ...]
    num_last: int
    is_packed: bool
    num_turns: int


def has_chat_template(backbone: Backbone) -> bool:
    """Whether the backbone was trained for conversations."""
    return bool(backbone.tokenizer.chat_template)


def encode_chat(
    backbone: Backbone, messages: Sequence[Mapping[str, str]], text_format: TextFormat | None = None
) -> list[int]:
    """Token ids of messages with `role` and `content`, up to where the next answer begins.

    They equal those of `tokenizer.apply_chat_template`; the template writes the special tokens, and the tokenizer adds
    none.

    Args:
        backbone: Its tokenizer counts.
        messages: All of them; the last one is the user's.
        text_format: Names the chat template; None: the backbone's own.

    Raises:
        RequestError: The template refuses the messages.
    """
    text = render_chat(backbone.tokenizer, text_format or _OWN, messages, add_generation_prompt=True)
    _check_characters(text)
    return backbone.encode(text)


def as_conversation(source: Source) -> list[dict[str, str]]:
    """The messages of a source; a text is the user's.

    >>> as_conversation("Hi")
    [{'role': 'user', 'content': 'Hi'}]
    """
    if isinstance(source, str):
        return [{"role": "user", "content": source}]
    return [message._asdict() if isinstance(message, Message) else dict(message) for message in source]


def only_text(source: Source) -> str:
    """The text of a source for a format without a chat template.

    Raises:
        RequestError: It is a conversation of several messages, which no plain format has room for.
    """
    if isinstance(source, str):
        return source
    if len(source) > 1:
        raise RequestError(
            f"a conversation has {len(source)} messages, but the text format has no chat template and reads one text.",
            hint="send the last user message alone, or train with a chat template.",
        )
    return as_conversation(source)[0]["content"]


def chat_format(backbone: Backbone, template: str, system: str = "") -> TextFormat:
    """The text format of a chat template, with the token that ends a turn.

    A template may write something before an answer that the model has to generate, such as Qwen 3's empty thought: it
    is part of the labels, and `target` has it, so that it is taken from an output.

    Args:
        backbone: Its tokenizer counts.
        template: `model`, or the text of a Jinja template.
        system: The system message of a conversation that has none.

    Raises:
        RequestError: The backbone has no template, or it refuses a question and an answer.
        DataError: The template cannot be stored.
    """
    own = template == MODEL_TEMPLATE
    # Whoever asks for a format has chosen its template; one that a file holds is read by `read_text_format`.
    allow_template(template)
    if own and not has_chat_template(backbone):
        raise RequestError(
            f"{backbone.name!r} has no chat template.", hint="give one (--chat-template FILE), or none (none)."
        )
    form = TextFormat(
        "{source}",
        "{target}",
        backbone.separator,
        chat_template=template,
        template_hash=template_hash(backbone.tokenizer) if own else "",
        system=system,
    )
    end, head = _end_of_turn(backbone, form) or backbone.end, _before_answer(backbone, form)
    return replace(form, end=end, target=f"{head}{{target}}" if head.strip() and "{target}" not in head else "{target}")


def literal_format(backbone: Backbone, text_format: TextFormat) -> TextFormat:
    """A text format without a chat template that writes the same text around one user message.

    For programs that know no such templates.

    Args:
        backbone: Its tokenizer counts.
        text_format: Any; one without a chat template is returned as it is.

    Raises:
        RequestError: The template refuses a user message, or writes it never or more than once.
    """
    if not text_format.is_chat:
        return text_format
    before, after = split_at_last_message(backbone.tokenizer, text_format, as_conversation(""))
    # In a template braces would be placeholders.
    if any(placeholder in before + after for placeholder in ("{source}", "{separator}")):
        raise RequestError("the chat template writes {source} or {separator}.", hint="use another template.")
    return replace(
        text_format,
        prompt=f"{before}{{source}}{after}",
        target="{target}",
        chat_template="",
        template_hash="",
        system="",
    )


def end_ids(backbone: Backbone, text_format: TextFormat | None = None) -> tuple[int, ...]:
    """The tokens, besides the tokenizer's end token, at which an answer ends.

    Args:
        backbone: Its tokenizer counts.
        text_format: What the answer is written in; None: the backbone's own chat template, if it has one.
    """
    if text_format is None:
        name = end_of_turn(backbone)
    elif text_format.is_chat or (text_format.end and text_format.end == end_of_turn(backbone)):
        # A format without a chat template may be the text that one writes (`evaluation.prompting`).
        name = text_format.end
    else:
        name = ""
    if not name or name == backbone.end:
        return ()
    ids = backbone.encode(name)
    return (ids[0],) if len(ids) == 1 else ()


def special_stops(backbone: Backbone, stop: Sequence[str]) -> tuple[int, ...]:
    """The tokens of those stop strings that are special tokens, such as `<|eot_id|>`: a text never shows them.

    Args:
        backbone: Its tokenizer counts.
        stop: Strings that end a text.
    """
    if not stop:
        return ()
    special: dict[str, int] | None = backbone.tokenizer_cache.get("special_tokens")
    if special is None:
        added = getattr(backbone.tokenizer, "added_tokens_decoder", {})
        special = {token.content: number for number, token in added.items() if token.special}
        backbone.tokenizer_cache["special_tokens"] = special
    return tuple(special[string] for string in stop if string in special)


def end_of_turn(backbone: Backbone) -> str:
    """The token after an answer in the backbone's own chat template; empty: none, or the tokenizer's end token."""
    found: str | None = backbone.tokenizer_cache.get("end_of_turn")
    if found is None:
        try:
            found = _end_of_turn(backbone, _OWN) if has_chat_template(backbone) else ""
        except RequestError:
            found = ""
        found = "" if found == backbone.end else found
        backbone.tokenizer_cache["end_of_turn"] = found
    return found


def encode_conversation(
    backbone: Backbone,
    text_format: TextFormat,
    messages: Sequence[Message],
    targets: Sequence[str],
    *,
    last_only: bool = False,
    limit: int | None = None,
) -> ConversationTurns:
    """Every answer of a conversation as token ids.

    What is before an answer is the messages before it, as `apply_chat_template` writes them with
    `add_generation_prompt`; its labels are what the template writes after that, up to the token that ends the turn.

    Args:
        backbone: Its tokenizer counts.
        text_format: Names the chat template.
        messages: All messages before the targets; the last one is the user's.
        targets: The answers to the last message.
        last_only: Leave out the earlier answers.
        limit: Positions of a turn: what follows an earlier one that takes more is not encoded.

    Raises:
        RequestError: The template refuses the messages.
    """
    conversation = as_conversation(messages)
    earlier = [index for index, one in enumerate(conversation) if one["role"] == "assistant" and not last_only]
    answers = [(index, conversation[index]["content"]) for index in earlier]
    answers += [(len(conversation), target) for target in targets]
    encoder = _Encoder(backbone)
    turns = _encode_turns(backbone, text_format, conversation, answers, limit, encoder)
    if not encoder.is_exact:
        turns = _encode_turns(backbone, text_format, conversation, answers, limit, _Encoder(backbone, shares=False))
    following = itertools.pairwise(turns[: len(earlier) + 1])
    is_packed = all(later.prompt[: turn.length] == turn.prompt + turn.labels for turn, later in following)
    num_last = len(targets) if len(turns) == len(answers) else 0
    return ConversationTurns(tuple(turns), num_last, is_packed, len(answers))


def lengths_around(backbone: Backbone, text_format: TextFormat, source: Source) -> tuple[int, int]:
    """Tokens before and after the content of a source's last message.

    Raises:
        RequestError: The template refuses the messages, or the content is not there once.
    """
    before, after = split_at_last_message(backbone.tokenizer, text_format, as_conversation(source))
    return len(backbone.encode(before)), len(backbone.encode(after))


class _Encoder:
    """Encodes texts of which each begins like one before it; what they share is encoded once.

    A tokenizer splits a text at special tokens first, so that the tokens on their two sides do not depend on each
    other. What is shared is encoded up to the last special token in it; the rest, after that token.

    Args:
        backbone: Its tokenizer counts.
        shares: Whether to do so; else every text is encoded as a whole.
    """

    def __init__(self, backbone: Backbone, *, shares: bool = True) -> None:
        self._backbone = backbone
        added = backbone.tokenizer.added_tokens_decoder if shares and backbone.tokenizer.is_fast else {}
        self._specials = {token_id: str(token.content) for token_id, token in added.items() if token.special}
        # The last two texts, each up to its last special token, and their tokens: an answer is sometimes written in
        # another way once others follow it, and what was before it is then still shared.
        self._known: deque[tuple[str, list[int]]] = deque(maxlen=2)
        self._latest: tuple[str, list[int]] = ("", [])

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""
        shared = next((known for known in reversed(self._known) if text.startswith(known[0])), None)
        ids = self._backbone.encode(text) if shared is None else self._after(text, *shared)
        self._latest = text, ids
        last = next((index for index in range(len(ids) - 1, -1, -1) if ids[index] in self._specials), None)
        if last is not None:
            name = self._specials[ids[last]]
            self._known.append((text[: text.rfind(name) + len(name)], ids[: last + 1]))
        return ids

    def _after(self, text: str, beginning: str, ids: list[int]) -> list[int]:
        """The tokens of a text with a known beginning, which ends with a special token."""
        return ids[:-1] + self._backbone.encode(self._specials[ids[-1]] + text[len(beginning) :])

    @property
    def is_exact(self) -> bool:
        """Whether the tokens of the latest text, and so of what the others share with it, are the tokenizer's own."""
        text, ids = self._latest
        return ids == self._backbone.encode(text)


def _encode_turns(
    backbone: Backbone,
    text_format: TextFormat,
    conversation: Sequence[Mapping[str, str]],
    answers: Sequence[tuple[int, str]],
    limit: int | None,
    encoder: _Encoder,
) -> list[Turn]:
    """The turns of a conversation, up to an earlier one that is too long.

    Args:
        backbone: Its tokenizer counts.
        text_format: Names the chat template.
        conversation: All messages before the last answers.
        answers: How many messages are before each answer, and its text.
        limit: As in `encode_conversation`.
        encoder: What encodes the texts.
    """
    turns: list[Turn] = []
    for index, answer in answers:
        turns.append(_encode_turn(backbone, text_format, conversation[:index], answer, encoder))
        if limit is not None and turns[-1].length > limit and index < len(conversation):
            break
    return turns


def _encode_turn(
    backbone: Backbone,
    text_format: TextFormat,
    messages: Sequence[Mapping[str, str]],
    answer: str,
    encoder: _Encoder,
) -> Turn:
    """The tokens before an answer, and its own."""
    tokenizer = backbone.tokenizer
    before = render_chat(tokenizer, text_format, messages, add_generation_prompt=True)
    answered = [*messages, {"role": "assistant", "content": answer}]
    whole = render_chat(tokenizer, text_format, answered, add_generation_prompt=False)
    _check_characters(whole)
    prompt, ids = encoder.encode(before), encoder.encode(whole)
    # Generation starts after the prompt's own tokens, whatever the tokens of the whole text are.
    text = whole[len(before) :] if whole.startswith(before) else answer
    labels = ids[len(prompt) :] if ids[: len(prompt)] == prompt else backbone.encode(text)
    ends = (*end_ids(backbone, text_format), backbone.eos_id)
    stop = _stop(backbone, labels, set(ends))
    if stop is None:
        return Turn(tuple(prompt), (*backbone.encode(text.rstrip()), ends[0]))
    return Turn(tuple(prompt), tuple(labels[:stop]))


def _stop(backbone: Backbone, labels: Sequence[int], ends: set[int]) -> int | None:
    """How many tokens of a written answer are generated: up to the end token after its content; None: there is none."""

    def is_blank(first: int, stop: int) -> bool:
        return not str(backbone.tokenizer.decode(labels[first:stop])).strip()

    found: int | None = None
    after = len(labels)
    for index in range(len(labels) - 1, -1, -1):
        if labels[index] in ends:
            if not is_blank(index + 1, after):
                break
            found = after = index
    return None if found is None else found + 1


def _end_of_turn(backbone: Backbone, text_format: TextFormat) -> str:
    """The special token that a chat template writes after an answer; empty: it writes none.

    Raises:
        RequestError: It leaves out the question or the answer.
    """

    def written(question: str) -> str:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": _ANSWER}]
        return render_chat(backbone.tokenizer, text_format, messages, add_generation_prompt=False)

    text = written(_QUESTION)
    # A template may rewrite the question: strip it, or cut what is not the last message.
    for role, is_written in (("user", text != written(_QUESTION[::-1])), ("assistant", _ANSWER in text)):
        if not is_written:
            raise RequestError(
                f"the chat template does not write the message of the role {role!r}.",
                hint="it gets messages, each with role (system, user or assistant) and content.",
            )
    after = text.rpartition(_ANSWER)[2]
    ids = backbone.encode(after.lstrip())
    added = backbone.tokenizer.added_tokens_decoder
    return str(added[ids[0]].content) if ids and ids[0] in added else ""


def _before_answer(backbone: Backbone, text_format: TextFormat) -> str:
    """What a chat template writes between the prompt and an answer, as an output shows it; empty: nothing.

    Raises:
        RequestError: The template refuses the messages.
    """
    messages = [{"role": "user", "content": _QUESTION}]
    before = render_chat(backbone.tokenizer, text_format, messages, add_generation_prompt=True)
    messages.append({"role": "assistant", "content": _ANSWER})
    whole = render_chat(backbone.tokenizer, text_format, messages, add_generation_prompt=False)
    head = whole.removeprefix(before).partition(_ANSWER)[0] if whole.startswith(before) else ""
    return str(backbone.tokenizer.decode(backbone.encode(head), skip_special_tokens=True)) if head else ""


def _check_characters(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a message holds half a surrogate pair at position {error.start} of the conversation, which is no "
            "character.",
            hint="write UTF-8 text.",
        ) from error
