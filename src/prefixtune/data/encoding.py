"""Texts -> token ids: the text format of a request, prompts, and examples to train on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from prefixtune.attention.injection import interrupt
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, as_conversation, encode_chat, encode_conversation, only_text
from prefixtune.data.chat_examples import TurnsAs, encode_conversation_examples
from prefixtune.data.examples import Example, check_messages, conversation_of
from prefixtune.data.tokenized import TokenizedDataset as TokenizedDataset
from prefixtune.data.tokenized import TokenizedExample as TokenizedExample
from prefixtune.data.truncation import fit_source, named_example, position_limit
from prefixtune.data.windows import DEFAULT_WINDOW, is_text, text_windows
from prefixtune.errors import ConfigError, DataError, RequestError, describe_value, short_repr
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, bounded, read_text_format

_PART = 256
"""Examples that one call of a tokenizer reads, at most."""
_PART_CHARS = 2**20
"""Characters of several examples that one call of a tokenizer reads, at most."""
_Item = TypeVar("_Item")


def default_format(backbone: Backbone, *, for_head: bool = False) -> TextFormat:
    """The text around source and target that suits a kind of model.

    A decoder-only model reads both in one text, with a separator between (the authors' format); an encoder reads the
    source as it is, within the tokenizer's own special tokens. For a head, a decoder-only model reads the source alone:
    its hidden state at a separator says little about the text before it.
    """
    if for_head and backbone.kind == "decoder":
        return TextFormat(" {source}", "{target}")
    return TextFormat() if backbone.kind == "decoder" else TextFormat("{source}", "{target}")


def check_texts(texts: Sequence[Source]) -> None:
    """Refuse anything but a list of strings and of conversations.

    Raises:
        RequestError: It is something else.
    """
    if isinstance(texts, str | Mapping) or not (hasattr(texts, "__len__") and hasattr(texts, "__iter__")):
        raise RequestError(f"texts is {short_repr(texts)}, not a list of strings.", hint="write [text], or [messages].")
    for number, text in enumerate(texts, start=1):
        if isinstance(text, list | tuple):
            try:
                check_messages(text, f"conversation {number}")
            except DataError as error:
                raise RequestError(error.message, hint=error.hint) from None
        elif not isinstance(text, str):
            raise RequestError(f"text {number} is {describe_value(text)}, not a string.", hint="write a list of texts.")


TextFormatLike = TextFormat | Mapping[str, Any]
"""A text format, or a dict of its fields."""


def as_text_format(text_format: TextFormatLike | None) -> TextFormat | None:
    """The text format that a caller gave; None: none. Its chat template, too, must have been named to be rendered.

    >>> as_text_format({"prompt": "{source} ="}).prompt
    '{source} ='

    Raises:
        ConfigError: It is neither a `TextFormat` nor a dict of its fields.
        DataError: A template lacks its text.
    """
    if text_format is None or isinstance(text_format, TextFormat):
        return text_format
    if not isinstance(text_format, Mapping):
        raise ConfigError(
            f"text_format is {describe_value(text_format)}, but must be a TextFormat or a dict.",
            hint='write for example {"prompt": "{source} =", "target": " {target}"}.',
        )
    return TextFormat.from_dict(text_format)


def format_of(backbone: Backbone, prefix: Prefix | None, text_format: TextFormat | None = None) -> TextFormat:
    """The text format of a request: the given one, else the prefix's, else the backbone's default.

    Raises:
        CheckpointError: The format in the prefix's header cannot be used.
    """
    stored = None if prefix is None or text_format is not None else read_text_format(prefix.header)
    return text_format or stored or default_format(backbone)


def encode_prompts(
    backbone: Backbone, text_format: TextFormat, sources: Sequence[Source], *, positions: int | None = None
) -> list[list[int]]:
    """Token ids of the text before the targets, or of the text that an encoder reads.

    Args:
        backbone: Its tokenizer counts.
        text_format: The text around a source; with a chat template, a text is one user message.
        sources: Texts, or conversations.
        positions: Most tokens of a prompt that could fit, as `Backbone.max_positions` says, or the engine. Of one that
            takes more, there are ids enough to cut its source at the end, or to refuse it (see `bounded`). None:
            there are all.

    Raises:
        RequestError: A conversation has more than one message, and the format has no chat template; or the template
            refuses it.
    """
    if text_format.is_chat:
        return [encode_chat(backbone, as_conversation(source), text_format, positions=positions) for source in sources]
    texts = [
        text_format.format_prompt(bounded(backbone, only_text(source), positions), backbone.separator)
        for source in sources
    ]
    return [ids for part in _in_parts(texts, len) for ids in backbone.encode_sources(part)]


def encode_pairs(
    backbone: Backbone, text_format: TextFormat, examples: Sequence[Example]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each example's source and first target as token ids, neither of them cut; of a conversation, its last answer.

    Raises:
        RequestError: A chat template refuses an example.
    """
    if text_format.is_chat:
        chats = [(conversation_of(example), example.targets[:1]) for example in examples]
        made = [encode_conversation(backbone, text_format, *chat, last_only=True).turns for chat in chats]
        return [(turn.prompt, turn.labels) for (turn,) in made]
    solved = [replace(example, targets=example.targets[:1]) for example in examples]
    plain = _encode_plain(backbone, solved, text_format)
    return [(tuple(prompt), tuple(target)) for _, prompt, (target,) in plain]


def encode_examples(
    backbone: Backbone,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: TruncationPolicy = "cut",
    turns: TurnsAs = "packed",
) -> TokenizedDataset:
    """Turn examples into token ids; sources that do not fit are truncated, targets never.

    Of a conversation, every answer is a target (see `data.chat_examples`). A text without a source is learned as it is,
    in several windows if it is long (see `data.windows`).

    Args:
        backbone: Its tokenizer and positions count.
        examples: Each with at least one target.
        text_format: The text around source and target.
        prefix_length: P; the prefix takes as many of the backbone's positions.
        max_length: Positions of source and target together (of each, for an encoder-decoder); 0: as many as the
            backbone allows.
        on_too_long: `cut` the source at its end, or raise an `error`.
        turns: How conversations become examples.

    Raises:
        DataError: There is no example, one has no target, a target is longer than the limit, or an example is too long
            and may not be truncated.
    """
    if not examples:
        raise DataError("there is no example to train on.", hint="check the file and `limit`.")
    for number, example in enumerate(examples, start=1):
        with named_example(example, number):
            _check_example(example, text_format)
    limit = position_limit(backbone, prefix_length, max_length)
    parts: list[TokenizedDataset] = []
    if text_format.is_chat:
        for number, example in enumerate(examples, start=1):
            interrupt()
            with named_example(example, number):
                parts.append(
                    encode_conversation_examples(
                        backbone, example, text_format, limit, on_too_long=on_too_long, kind=turns
                    )
                )
        return TokenizedDataset.of_all(parts)
    window = min(limit, max_length or DEFAULT_WINDOW)
    for number, (example, prompt, targets) in enumerate(_encode_plain(backbone, examples, text_format, limit), start=1):
        with named_example(example, number):
            if _is_learned_whole(backbone, example):
                parts.append(TokenizedDataset.of_one(*text_windows(prompt, targets[0], window)))
            else:
                kept = fit_source(backbone, text_format, prompt, targets, limit, on_too_long)
                row = TokenizedExample(kept, tuple(map(tuple, targets)))
                parts.append(TokenizedDataset.of_one(row, prompt_length=len(prompt)))
    return TokenizedDataset.of_all(parts)


def _check_example(example: Example, text_format: TextFormat) -> None:
    """Refuse an example without a target, and a conversation that only a chat template can write."""
    if not example.targets:
        raise RequestError("it has no target.", hint="name the target column.")
    if len(example.messages) > 1 and not text_format.is_chat:
        what = "a system message" if example.messages[0].role == "system" else "several turns"
        raise RequestError(
            f"it has {what}, which needs a chat template, but there is none.",
            hint="give one (--chat-template FILE, a Jinja template), or take a model that has one.",
        )


def _is_learned_whole(backbone: Backbone, example: Example) -> bool:
    return is_text(example) and backbone.kind == "decoder"


def _encode_plain(
    backbone: Backbone, examples: Sequence[Example], text_format: TextFormat, limit: int | None = None
) -> Iterator[tuple[Example, list[int], list[list[int]]]]:
    """Each example's prompt and targets, not cut yet, some at a time: other work has its turns between."""
    numbers = itertools.count(1)
    for part in _in_parts(examples, lambda one: len(one.source) + sum(map(len, one.targets))):
        interrupt()
        prompts, targets = [], []
        for example in part:
            most = None if _is_learned_whole(backbone, example) else limit
            with named_example(example, next(numbers)):
                prompts.append(text_format.format_prompt(bounded(backbone, example.source, limit), backbone.separator))
                targets += [text_format.format_target(bounded(backbone, target, most)) for target in example.targets]
        target_ids = iter(backbone.encode_targets(targets))
        for example, prompt in zip(part, backbone.encode_sources(prompts), strict=True):
            yield example, prompt, [next(target_ids) for _ in example.targets]


def _in_parts(items: Iterable[_Item], size: Callable[[_Item], int]) -> Iterator[list[_Item]]:
    """The items that one call of a tokenizer reads; `size` counts the characters of one, which may be a part alone."""
    part: list[_Item] = []
    room = _PART_CHARS
    for item in items:
        if part and (len(part) == _PART or size(item) > room):
            yield part
            part, room = [], _PART_CHARS
        part.append(item)
        room -= size(item)
    if part:
        yield part
