"""Texts -> token ids: the text format of a request, prompts, and examples to train on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from prefixtune.attention.injection import interrupt
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, as_conversation, encode_chat, encode_conversation, only_text
from prefixtune.data.chat_examples import Turns, check_plain, encode_conversations
from prefixtune.data.examples import Example, check_messages, conversation_of
from prefixtune.data.tokenized import TokenizedDataset as TokenizedDataset
from prefixtune.data.tokenized import TokenizedExample as TokenizedExample
from prefixtune.data.truncation import position_limit, template_lengths
from prefixtune.data.windows import DEFAULT_WINDOW, is_text, text_windows
from prefixtune.errors import ConfigError, DataError, RequestError, describe_value, short_repr
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, cut_prompt, read_text_format

_PART = 256
"""Texts that are tokenized between two calls of `interrupt`."""
_T = TypeVar("_T")


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
    """The text format that a caller gave; None: none.

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


def encode_prompts(backbone: Backbone, text_format: TextFormat, sources: Sequence[Source]) -> list[list[int]]:
    """Token ids of the text before the targets, or of the text that an encoder reads.

    Args:
        backbone: Its tokenizer counts.
        text_format: The text around a source; with a chat template, a text is one user message.
        sources: Texts, or conversations.

    Raises:
        RequestError: A conversation has more than one message, and the format has no chat template; or the template
            refuses it.
    """
    if text_format.is_chat:
        return [encode_chat(backbone, as_conversation(source), text_format) for source in sources]
    texts = [only_text(source) for source in sources]
    return backbone.encode_sources([text_format.format_prompt(text, backbone.separator) for text in texts])


def encode_pairs(
    backbone: Backbone, text_format: TextFormat, examples: Sequence[Example]
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Each example's source and first target as token ids, neither of them cut; of a conversation, its last answer.

    Raises:
        RequestError: A chat template refuses an example.
    """
    if text_format.is_chat:
        found = [
            encode_conversation(backbone, text_format, conversation_of(example), example.targets[:1], last_only=True)
            for example in examples
        ]
        return [(turns.turns[-1].prompt, turns.turns[-1].labels) for turns in found]
    prompts = encode_prompts(backbone, text_format, [example.source for example in examples])
    targets = backbone.encode_targets([text_format.format_target(example.targets[0]) for example in examples])
    return [(tuple(prompt), tuple(target)) for prompt, target in zip(prompts, targets, strict=True)]


def encode_examples(
    backbone: Backbone,
    examples: Sequence[Example],
    text_format: TextFormat,
    *,
    prefix_length: int,
    max_length: int = 0,
    on_too_long: TruncationPolicy = "cut",
    turns: Turns = "packed",
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
        if not example.targets:
            raise DataError(
                f"example {number} ({example.source[:60]!r}) has no target.", hint="name the target column."
            )
    limit = position_limit(backbone, prefix_length, max_length)
    if text_format.is_chat:
        return encode_conversations(backbone, examples, text_format, limit, on_too_long, turns=turns)
    for number, example in enumerate(examples, start=1):
        check_plain(example, number)
        _check_characters(example, number)
    prompts = _in_parts(partial(encode_prompts, backbone, text_format), [example.source for example in examples])
    targets_of_all = [text_format.format_target(target) for example in examples for target in example.targets]
    target_ids = iter(_in_parts(backbone.encode_targets, targets_of_all))
    before, after = template_lengths(backbone, text_format)
    separate = backbone.kind == "encoder-decoder"
    tokenized: list[TokenizedExample] = []
    whole: list[Sequence[int]] = []
    origins: list[int] = []
    for number, (example, prompt) in enumerate(zip(examples, prompts, strict=True), start=1):
        name = f"example {number} ({example.source[:60]!r})"
        targets = tuple(tuple(next(target_ids)) for _ in example.targets)
        longest = max(map(len, targets))
        if is_text(example) and backbone.kind == "decoder":
            windows = text_windows(prompt, targets[0], min(limit, max_length or DEFAULT_WINDOW))
            tokenized += windows
            whole += [window.prompt for window in windows]
            origins += [number - 1] * len(windows)
            continue
        room = limit if separate else limit - longest
        if longest > limit or (len(prompt) > room and room <= before + after):
            raise DataError(
                f"a target of {name} takes {longest} tokens, but only {limit} positions are there for "
                f"{'it' if separate else 'source and target'}, and the text around a source takes {before + after}.",
                hint="shorten it or raise max_length; targets are never truncated.",
            )
        if len(prompt) > room and on_too_long == "error":
            raise DataError(
                f"{name} takes {len(prompt)} tokens and its longest target {longest}, but {limit} positions are "
                "allowed.",
                hint="raise max_length, or set on_too_long = 'cut' to truncate the source.",
            )
        tokenized.append(TokenizedExample(tuple(cut_prompt(prompt, room, after)), targets))
        whole.append(prompt)
        origins.append(number - 1)
    dataset = TokenizedDataset.from_prompts(tokenized, whole)
    return dataset if len(origins) == len(examples) else replace(dataset, origins=tuple(origins))


def _check_characters(example: Example, number: int) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        DataError: The source or a target holds half a surrogate pair.
    """
    for text in (example.source, *example.targets):
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                f"example {number} holds half a surrogate pair at position {error.start} of a text, which is no "
                "character.",
                hint="write UTF-8 text.",
            ) from None


def _in_parts(encode: Callable[[Sequence[str]], list[_T]], texts: Sequence[str]) -> list[_T]:
    """What a function makes of texts, some at a time: other work has its turns between."""
    found: list[_T] = []
    for first in range(0, len(texts), _PART):
        interrupt()
        found += encode(texts[first : first + _PART])
    return found
