"""Texts -> token ids: the text format of a request, prompts, and examples to train on."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeVar

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Source, Turn, as_conversation, encode_chat, encode_conversation, only_text
from prefixtune.data.examples import Example, check_messages, conversation_of
from prefixtune.data.tokenized import TokenizedDataset as TokenizedDataset
from prefixtune.data.tokenized import TokenizedExample as TokenizedExample
from prefixtune.data.truncation import fit_source, named_example, position_limit
from prefixtune.errors import DataError, RequestError, describe_value, short_repr
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, bounded, read_text_format

_PART = 256
"""Examples that one call of a tokenizer reads, at most."""
_PART_CHARS = 2**20
"""Characters of several examples that one call of a tokenizer reads, at most."""
TurnsAs = Literal["packed", "separate", "last"]
"""How a conversation becomes examples: computed once, where its template allows that; each turn by itself; or its last
turn alone."""
TEXT_FORMAT = TextFormat("{separator}{source}", "{target}")
"""A text follows the token that begins texts, with nothing else around it; a beginning to go on with is the source."""
AS_IT_IS = TextFormat("{source}", "{target}")
DEFAULT_WINDOW = 512
"""Positions of a window, where `max_length` says nothing; a batch of whole contexts would take much memory."""
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


def plain_format(backbone: Backbone) -> TextFormat:
    """Of a text that the bare model continues: as it is, behind the token that the tokenizer begins texts with."""
    return TEXT_FORMAT if backbone.kind == "decoder" and backbone.begins_texts else AS_IT_IS


def check_texts(texts: Sequence[Source]) -> list[Source]:
    """The strings and conversations of a list, whose messages may have any form that `check_messages` reads.

    Raises:
        RequestError: It is something else.
    """
    if isinstance(texts, str | Mapping) or not (hasattr(texts, "__len__") and hasattr(texts, "__iter__")):
        raise RequestError(f"texts is {short_repr(texts)}, not a list of strings.", hint="write [text], or [messages].")
    checked: list[Source] = list(texts)
    for number, text in enumerate(checked, start=1):
        if isinstance(text, list | tuple):
            try:
                checked[number - 1] = check_messages(text, f"conversation {number}")
            except DataError as error:
                raise RequestError(error.message, hint=error.hint) from None
        elif not isinstance(text, str):
            raise RequestError(f"text {number} is {describe_value(text)}, not a string.", hint="write a list of texts.")
    return checked


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

    Of a conversation, every answer is a target. A text without a source is learned as it is,
    in several windows if it is long (see `text_windows`).

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
            with named_example(example, number):
                parts.append(
                    _encode_conversation_example(
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


# --- conversations ---------------------------------------------------------------------------------------------------


def _encode_conversation_example(
    backbone: Backbone,
    example: Example,
    text_format: TextFormat,
    limit: int,
    *,
    on_too_long: TruncationPolicy,
    kind: TurnsAs,
) -> TokenizedDataset:
    """Turn a conversation into token ids: each answer of the assistant is a target.

    Turns that continue each other are one example, whose turns are the parts of its only target that are labels.
    Otherwise each is an example of its own: where the template writes earlier answers in another way, and where a
    conversation has several last answers. Of one that is too long, the last turns are left out; where the first turn
    alone is too long, its user message is cut at its end.

    Args:
        backbone: Its tokenizer counts.
        example: With at least one target; without messages it is a single user message.
        text_format: Names the chat template.
        limit: Positions of a conversation.
        on_too_long: `error`: refuse one that is too long.
        kind: How it becomes examples.

    Raises:
        RequestError: The template refuses it, or it is too long.
    """
    messages, num_targets = conversation_of(example), len(example.targets)
    earlier = [index for index, one in enumerate(messages) if one.role == "assistant" and kind != "last"]
    turns, is_packed = encode_conversation(
        backbone, text_format, messages, example.targets, last_only=kind == "last", limit=limit
    )
    # The first turns, as many as fit; the last answers to one message are kept or left out together.
    fits = [turn.length <= limit for turn in turns]
    fitting = list(turns if all(fits) else turns[: min(fits.index(False), len(earlier))])
    num_turns = len(earlier) + num_targets
    if len(fitting) < num_turns and on_too_long == "error":
        longest = max(turns, key=lambda turn: turn.length)
        raise RequestError(
            f"it takes {longest.length} tokens, {len(longest.labels)} of them a target, but {limit} positions are "
            "allowed.",
            hint="raise max_length, or set on_too_long = 'cut' to leave out the last turns or cut the source.",
        )
    longest_prompt, num_truncated = max((len(turn.prompt) for turn in fitting), default=0), 0
    if not fitting:
        # The first message to be answered is cut, so that the answers to it fit.
        first, stop = (turns[:1], earlier[0]) if earlier else (turns, len(messages))
        labels = [turn.labels for turn in first]
        prompt = fit_source(backbone, text_format, first[0].prompt, labels, limit, source=messages[:stop])
        fitting, num_truncated = [turn._replace(prompt=prompt) for turn in first], 1
    num_last = num_targets if len(fitting) == num_turns else 1
    is_packed = is_packed and kind == "packed"
    num_unpacked = int(len(fitting) > num_last and not is_packed)
    rows = _examples_of(fitting, num_last, is_packed)
    return TokenizedDataset(rows, num_truncated, longest_prompt, num_turns - len(fitting), num_unpacked)


def _examples_of(turns: Sequence[Turn], num_last: int, is_packed: bool) -> list[TokenizedExample]:
    """The examples of a conversation: one where its turns are packed."""
    earlier = turns[: len(turns) - num_last]
    last = TokenizedExample(turns[-1].prompt, tuple(turn.labels for turn in turns[len(earlier) :]))
    if not earlier:
        return [last]
    if not is_packed:
        return [*(TokenizedExample(turn.prompt, (turn.labels,)) for turn in earlier), last]
    # The first of several last answers is packed with the earlier ones.
    chain = turns[: len(earlier) + 1]
    start = len(chain[0].prompt)
    whole = (*chain[-1].prompt, *chain[-1].labels)
    spans = tuple((len(turn.prompt) - start, turn.length - start) for turn in chain)
    packed = TokenizedExample(chain[0].prompt, (whole[start:],), turns=spans)
    return [packed, *([TokenizedExample(last.prompt, last.targets[1:])] if last.targets[1:] else [])]


# --- texts without a source ------------------------------------------------------------------------------------------


def is_text(example: Example) -> bool:
    """Whether an example is a text to learn as it is, with nothing before it."""
    return not example.source and not example.messages and len(example.targets) == 1


def text_windows(prompt: Sequence[int], text: Sequence[int], limit: int) -> list[TokenizedExample]:
    """A text's windows, each after the end of the one before.

    Nothing is left out: every token is a label once. A later window begins with the last tokens of the one before,
    which it only reads.

    >>> [(one.prompt, one.targets[0]) for one in text_windows([0], range(1, 11), 5)]
    [((0,), (1, 2, 3, 4)), ((4,), (5, 6, 7, 8)), ((6, 7, 8), (9, 10))]

    Args:
        prompt: What is before the text: the token that begins it.
        text: Its tokens, the end token included.
        limit: Positions of a window; a quarter of a later one is read only, of the last one more.

    Raises:
        DataError: There is no room for a token.
    """
    room = limit - len(prompt)
    if room < 1 or limit < 2:
        what = f"a window of a text has {limit} positions, and {len(prompt)} tokens are before the text."
        raise DataError(what, hint="raise max_length, or shorten prompt_format.")
    text = tuple(text)
    windows = [TokenizedExample(tuple(prompt), (text[:room],))]
    start, step = room, limit - max(1, limit // 4)
    while start < len(text):
        labels = text[start : start + step]
        windows.append(TokenizedExample(text[max(0, start - (limit - len(labels))) : start], (labels,)))
        start += len(labels)
    return windows
