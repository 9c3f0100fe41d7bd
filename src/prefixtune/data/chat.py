"""Conversations -> token ids, by a chat template: what is read before an answer, and where the answers are labels.

A conversation is rendered up to each answer and with it. Where each of these texts goes on with the one before, the
last one is tokenized once, and its tokens' characters say where the answers are. Where the template writes earlier
answers in another way than the last one (thinking is removed), or tokens join at a border, each turn stands alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.examples import Message
from prefixtune.errors import RequestError
from prefixtune.prefix.chat_format import allow_template, render_chat, split_at_last_message, template_hash
from prefixtune.prefix.text_format import MODEL_TEMPLATE, TextFormat, bounded

Source = str | Sequence[Message] | Sequence[Mapping[str, str]]
"""What is answered: one user message's text, or all messages before the answer."""

_OWN = TextFormat("{source}", "{target}", chat_template=MODEL_TEMPLATE)
_ANSWER, _QUESTION = "\ue000answer\ue001", "\ue000question\ue001"
"""A text that stands for a message; of characters for private use, which no template changes."""
_AROUND, _TIMES = 2**18, 4
"""Characters that a template may write around messages, and how often it may write each of them."""


class Turn(NamedTuple):
    """One answer of the assistant: the tokens before it, and its own up to where generation stops."""

    prompt: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def length(self) -> int:
        """Positions of both."""
        return len(self.prompt) + len(self.labels)


class Turns(NamedTuple):
    """The answers of a conversation.

    Attributes:
        turns: One per answer of the assistant; the last ones answer the same message where there are several targets.
            Those behind one that is far too long are left out.
        is_packed: Those up to the first target continue each other token by token, so that all is computed once.
    """

    turns: tuple[Turn, ...]
    is_packed: bool


class _Written(NamedTuple):
    """What a template writes before an answer, and with it."""

    before: str
    whole: str
    answer: str


# --- what a model reads ----------------------------------------------------------------------------------------------


def has_chat_template(backbone: Backbone) -> bool:
    """Whether the backbone was trained for conversations."""
    return bool(backbone.tokenizer.chat_template)


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
    chat = as_conversation(source)
    if len(chat) > 1:
        raise RequestError(
            f"a conversation has {len(chat)} messages, but the text format has no chat template and reads one text.",
            hint="send the last user message alone, or train with a chat template.",
        )
    return chat[0]["content"]


def encode_chat(
    backbone: Backbone,
    messages: Sequence[Mapping[str, str]],
    text_format: TextFormat | None = None,
    *,
    positions: int | None = None,
) -> list[int]:
    """Token ids of messages with `role` and `content`, up to where the next answer begins.

    They equal those of `tokenizer.apply_chat_template`; the template writes the special tokens, and the tokenizer adds
    none.

    Args:
        backbone: Its tokenizer counts.
        messages: All of them; the last one is the user's.
        text_format: Names the chat template; None: the backbone's own.
        positions: Of a conversation that takes more, there are ids enough to refuse it, or to cut its last message
            (see `prefix.text_format.bounded`); None: there are all.

    Raises:
        RequestError: The template refuses the messages.
    """
    messages = _bounded_messages(backbone, messages, positions)
    text = _render(backbone, text_format or _OWN, messages, opens=True)
    # All but the length of the last message, which alone may be cut. Templates may leave out the white space around it.
    head = text[: max(len(text) - len(messages[-1]["content"].strip()), 0)]
    beginning = bounded(backbone, head, positions)
    return backbone.encode(text if len(beginning) == len(head) else beginning)


def lengths_around(backbone: Backbone, text_format: TextFormat, source: Source) -> tuple[int, int]:
    """Tokens before and after the content of a source's last message.

    Raises:
        RequestError: The template refuses the messages, or the content is not there once.
    """
    before, after = split_at_last_message(backbone.tokenizer, text_format, as_conversation(source))
    return len(backbone.encode(bounded(backbone, before, backbone.max_positions))), len(backbone.encode(after))


def _render(backbone: Backbone, text_format: TextFormat, messages: Sequence[Mapping[str, str]], *, opens: bool) -> str:
    """What a template writes, with what opens the next answer or without; no tokenizer reads more than it may write.

    Raises:
        RequestError: The template refuses the messages, or writes far more than they hold.
    """
    text = render_chat(backbone.tokenizer, text_format, messages, add_generation_prompt=opens)
    most = _AROUND + _TIMES * sum(len(message["content"]) for message in messages)
    if len(text) > most:
        what = f"the chat template writes {len(text):,} characters for these messages, but at most {most:,} are read."
        raise RequestError(what, hint="use another template.")
    return text


def _bounded_messages(
    backbone: Backbone, messages: Sequence[Mapping[str, str]], positions: int | None
) -> list[dict[str, str]]:
    return [{**message, "content": bounded(backbone, message["content"], positions)} for message in messages]


# --- the format of a template ----------------------------------------------------------------------------------------


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
        raise RequestError(f"{backbone.name!r} has no chat template.", hint="give one (--chat-template FILE), or none.")
    form = TextFormat(
        "{source}",
        "{target}",
        backbone.separator,
        chat_template=template,
        template_hash=template_hash(backbone.tokenizer) if own else "",
        system=system,
    )
    head, end = _around_answer(backbone, form)
    return replace(
        form,
        end=end or backbone.end,
        target=f"{head}{{target}}" if head.strip() and "{target}" not in head else "{target}",
    )


def _around_answer(backbone: Backbone, text_format: TextFormat) -> tuple[str, str]:
    """What a template writes between prompt and answer, as an output shows it, and the special token after an answer.

    Either is empty where there is none.

    Raises:
        RequestError: It refuses the messages, or leaves out the question or the answer.
    """
    tokenizer, question = backbone.tokenizer, {"role": "user", "content": _QUESTION}
    before = _render(backbone, text_format, [question], opens=True)
    whole = _render(backbone, text_format, [question, {"role": "assistant", "content": _ANSWER}], opens=False)
    # A template may strip a question, or write it in capitals.
    for role, is_written in (("user", _QUESTION[0] in before), ("assistant", _ANSWER in whole)):
        if not is_written:
            what = f"the chat template does not write the message of the role {role!r}."
            raise RequestError(what, hint="it gets messages, each with role (system, user or assistant) and content.")
    head = whole.removeprefix(before).partition(_ANSWER)[0] if whole.startswith(before) else ""
    shown = str(tokenizer.decode(backbone.encode(head), skip_special_tokens=True)) if head else ""
    ids = backbone.encode(whole.rpartition(_ANSWER)[2].lstrip())
    added = tokenizer.added_tokens_decoder
    return shown, str(added[ids[0]].content) if ids and ids[0] in added else ""


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
    prompt = f"{before}{{source}}{after}"
    return replace(text_format, prompt=prompt, target="{target}", chat_template="", template_hash="", system="")


# --- where an answer ends --------------------------------------------------------------------------------------------


def end_ids(backbone: Backbone, text_format: TextFormat | None = None) -> tuple[int, ...]:
    """The tokens, besides the tokenizer's end token, at which an answer ends.

    Args:
        backbone: Its tokenizer counts.
        text_format: What the answer is written in; None: the backbone's own chat template, if it has one.
    """
    name = end_of_turn(backbone) if text_format is None else text_format.end
    # A format without a chat template may be the text that one writes (`evaluation.evaluate`).
    if text_format is not None and not text_format.is_chat and name != end_of_turn(backbone):
        return ()
    ids = backbone.encode(name) if name != backbone.end else []
    return (ids[0],) if len(ids) == 1 else ()


def stop_ids(backbone: Backbone, text_format: TextFormat | None = None) -> tuple[int, ...]:
    """The tokens, besides the tokenizer's end token, at which generation stops: `end_ids`, and the model's own ones."""
    return tuple(dict.fromkeys((*end_ids(backbone, text_format), *backbone.more_end_ids)))


def end_of_turn(backbone: Backbone) -> str:
    """The token after an answer in the backbone's own chat template; empty: none, or the tokenizer's end token."""
    found: str | None = backbone.tokenizer_cache.get("end_of_turn")
    if found is None:
        try:
            found = _around_answer(backbone, _OWN)[1] if has_chat_template(backbone) else ""
        except RequestError:
            found = ""
        found = "" if found == backbone.end else found
        backbone.tokenizer_cache["end_of_turn"] = found
    return found


def special_stops(backbone: Backbone, stop: Sequence[str]) -> tuple[int, ...]:
    """The tokens of those stop strings that are special tokens, such as `<|eot_id|>`: a text never shows them.

    Args:
        backbone: Its tokenizer counts.
        stop: Strings that end a text.
    """
    special = _special_tokens(backbone) if stop else {}
    return tuple(special[string] for string in stop if string in special)


def _special_tokens(backbone: Backbone) -> dict[str, int]:
    """The ids of the tokenizer's special tokens, by name."""
    found: dict[str, int] | None = backbone.tokenizer_cache.get("special_tokens")
    if found is None:
        added = getattr(backbone.tokenizer, "added_tokens_decoder", {})
        found = {token.content: number for number, token in added.items() if token.special}
        backbone.tokenizer_cache["special_tokens"] = found
    return found


# --- what is learned -------------------------------------------------------------------------------------------------


def encode_conversation(
    backbone: Backbone,
    text_format: TextFormat,
    messages: Sequence[Message],
    targets: Sequence[str],
    *,
    last_only: bool = False,
    limit: int | None = None,
) -> Turns:
    """Every answer of a conversation as token ids.

    What is before an answer is the messages before it, as `apply_chat_template` writes them with
    `add_generation_prompt`; its labels are what the template writes after that, up to the token that ends the turn.

    Args:
        backbone: Its tokenizer counts.
        text_format: Names the chat template.
        messages: All messages before the targets; the last one is the user's.
        targets: The answers to the last message.
        last_only: Leave out the earlier answers.
        limit: Positions of a turn; of what takes more, there are tokens enough to see that. None: any number.

    Raises:
        RequestError: The template refuses the messages.
    """
    conversation = _bounded_messages(backbone, as_conversation(messages), limit)
    earlier = [index for index, one in enumerate(conversation) if one["role"] == "assistant" and not last_only]
    answers = [(index, conversation[index]["content"]) for index in earlier]
    answers += [(len(conversation), bounded(backbone, target, limit)) for target in targets]
    written: list[_Written] = []
    for index, answer in answers:
        before = _render(backbone, text_format, conversation[:index], opens=True)
        answered = [*conversation[:index], {"role": "assistant", "content": answer}]
        written.append(_Written(before, _render(backbone, text_format, answered, opens=False), answer))
        if index < len(conversation) and len(bounded(backbone, before, limit)) < len(before):
            break
    ends = (*end_ids(backbone, text_format), backbone.eos_id)
    chain, others = written[: len(earlier) + 1], written[len(earlier) + 1 :]
    packed = _encode_chain(backbone, chain, ends)
    alone = others if packed is not None else written
    turns = (*(packed or ()), *(turn for one in alone for turn in _encode_chain(backbone, [one], ends) or ()))
    return Turns(turns, packed is not None)


def _encode_chain(backbone: Backbone, chain: Sequence[_Written], ends: Sequence[int]) -> list[Turn] | None:
    """The turns of texts of which each goes on with the one before it, token by token; None: they do not."""
    *earlier, last = chain
    is_fast, names = backbone.tokenizer.is_fast, backbone.tokenizer.convert_ids_to_tokens(list(ends))
    if earlier and not is_fast:
        return None
    found = backbone.tokenizer(last.before, add_special_tokens=False, return_offsets_mapping=is_fast, verbose=False)
    ids, offsets = found["input_ids"], found["offset_mapping"] if is_fast else []
    stops, special = [stop for _, stop in offsets], set(_special_tokens(backbone).values() if is_fast else ())

    def last_special(count: int) -> tuple[int, int]:
        """The last special token of so many; what follows one has the same tokens in any text: texts split there."""
        index = next((index for index in range(count - 1, 0, -1) if ids[index] in special), 0)
        return index, offsets[index][0] if index else 0

    turns: list[Turn] = []
    for one in earlier:
        whole = _until_end(one.whole, names)
        count = bisect_right(stops, len(one.before))
        labels = ids[count : bisect_right(stops, len(whole))]
        known, start = last_special(count)
        goes_on = last.before.startswith(whole) and whole.startswith(one.before) and labels and labels[-1] in ends
        if not goes_on or backbone.encode(one.before[start:]) != ids[known:count]:
            return None
        turns.append(Turn(tuple(ids[:count]), tuple(labels)))
    known, start = last_special(len(ids))
    whole, rest = _until_end(last.whole, names), ids[known:]
    follows = whole.startswith(last.before)
    labels = backbone.encode(whole[start:]) if follows else []
    if follows and labels[: len(rest)] == rest:
        labels = labels[len(rest) :]
    else:
        # Generation starts after the prompt's own tokens, whatever the tokens of the whole text are.
        labels = backbone.encode(whole[len(last.before) :] if follows else _until_end(last.answer, names))
    if not labels or labels[-1] not in ends:
        text = last.whole[len(last.before) :] if follows else last.answer
        labels = [*backbone.encode(text.rstrip()), ends[0]]
    return [*turns, Turn(tuple(ids), tuple(labels))]


def _until_end(text: str, names: Sequence[str]) -> str:
    """A text up to the token that ends an answer, without the blanks and the further end tokens behind it."""
    found, rest = text, text.rstrip()
    while name := next((name for name in names if rest.endswith(name)), ""):
        found, rest = rest, rest[: -len(name)].rstrip()
    return found
