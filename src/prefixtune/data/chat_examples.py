"""Conversations -> tokenized examples to train on.

Every answer of the assistant is a target. A conversation whose turns continue each other is one example, whose turns
are the parts of its only target that are labels. Otherwise each turn is an example of its own: so it is where the
template writes earlier answers in another way, and where a conversation has several last answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from prefixtune.attention.injection import interrupt
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import ConversationTurns, Turn, encode_conversation, lengths_around
from prefixtune.data.examples import Example, Message, conversation_of
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample
from prefixtune.errors import DataError, RequestError
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy, cut_prompt

Turns = Literal["packed", "separate", "last"]
"""How a conversation becomes examples: computed once, where its template allows that; each turn by itself; or its last
turn alone."""


def check_plain(example: Example, number: int) -> None:
    """Refuse a conversation that only a chat template can write.

    Raises:
        DataError: It has a system message or several turns.
    """
    if len(example.messages) > 1:
        what = "a system message" if example.messages[0].role == "system" else "several turns"
        raise DataError(
            f"example {number} ({example.source[:60]!r}) has {what}, which needs a chat template, but there is none.",
            hint="give one (--chat-template FILE, a Jinja template), or take a model that has one.",
        )


def encode_conversations(
    backbone: Backbone,
    examples: Sequence[Example],
    text_format: TextFormat,
    limit: int,
    on_too_long: TruncationPolicy,
    *,
    turns: Turns = "packed",
) -> TokenizedDataset:
    """Turn conversations into token ids.

    Of one that is too long, the last turns are left out; where the first turn alone is too long, its user message is
    cut at its end.

    Args:
        backbone: Its tokenizer counts.
        examples: Each with at least one target; one without messages is a single user message.
        text_format: Names the chat template.
        limit: Positions of a conversation.
        on_too_long: `error`: refuse one that is too long.
        turns: How a conversation becomes examples.

    Raises:
        DataError: The template refuses an example, or one is too long.
    """
    tokenized: list[TokenizedExample] = []
    origins: list[int] = []
    longest_prompt = num_truncated = num_dropped = num_unpacked = 0
    for number, example in enumerate(examples, start=1):
        interrupt()
        messages = conversation_of(example)
        name = f"example {number} ({example.source[:60]!r})"
        try:
            found = encode_conversation(
                backbone, text_format, messages, example.targets, last_only=turns == "last", limit=limit
            )
            fitting = _fitting(found.turns, found.num_last, limit)
            if len(fitting) < found.num_turns and on_too_long == "error":
                longest = max(found.turns, key=lambda turn: turn.length)
                raise DataError(
                    f"{name} takes {len(longest.prompt)} tokens and its longest target {len(longest.labels)}, but "
                    f"{limit} positions are allowed.",
                    hint="raise max_length, or set on_too_long = 'cut' to leave out the last turns or cut the source.",
                )
            if fitting:
                longest_prompt = max(longest_prompt, *(len(turn.prompt) for turn in fitting))
            else:
                fitting = _cut_first(backbone, text_format, messages, found, limit, name)
                num_truncated += 1
        except RequestError as error:
            raise DataError(f"{name}: {error.message}", hint=error.hint) from None
        num_last = found.num_last if len(fitting) == found.num_turns else 1
        is_packed = found.is_packed and turns == "packed"
        made = _examples_of(fitting, num_last, is_packed)
        num_dropped += found.num_turns - len(fitting)
        num_unpacked += len(fitting) > num_last and not is_packed
        tokenized += made
        origins += [number - 1] * len(made)
    one_each = origins == list(range(len(examples)))
    return TokenizedDataset(
        tuple(tokenized), num_truncated, longest_prompt, num_dropped, num_unpacked, () if one_each else tuple(origins)
    )


def _fitting(turns: Sequence[Turn], num_last: int, limit: int) -> list[Turn]:
    """The first turns, as many as fit; the last answers to one message are kept or left out together."""
    num_earlier = len(turns) - num_last
    fitting: list[Turn] = []
    for turn in turns[:num_earlier]:
        if turn.length > limit:
            return fitting
        fitting.append(turn)
    last = turns[num_earlier:]
    return [*fitting, *last] if all(turn.length <= limit for turn in last) else fitting


def _cut_first(
    backbone: Backbone,
    text_format: TextFormat,
    messages: Sequence[Message],
    found: ConversationTurns,
    limit: int,
    name: str,
) -> list[Turn]:
    """The answers to the first user message, which is cut at its end so that they fit.

    Where only the last answers are wanted, these are, and the last message is cut.

    Raises:
        DataError: An answer is too long, or nothing of the message would stay.
    """
    first, stop = list(found.turns), len(messages)
    if found.num_turns > found.num_last:
        first, stop = first[:1], next(index for index, message in enumerate(messages) if message.role == "assistant")
    before, after = lengths_around(backbone, text_format, messages[:stop])
    longest = max(len(turn.labels) for turn in first)
    if limit - longest <= before + after:
        raise DataError(
            f"a target of {name} takes {longest} tokens, but only {limit} positions are there for source and target, "
            f"and the chat template takes {before + after}.",
            hint="shorten it or raise max_length; targets are never truncated.",
        )
    prompt = tuple(cut_prompt(first[0].prompt, limit - longest, after))
    return [turn._replace(prompt=prompt) for turn in first]


def _examples_of(turns: Sequence[Turn], num_last: int, is_packed: bool) -> list[TokenizedExample]:
    """The examples of a conversation: one where its turns are packed."""
    num_earlier = len(turns) - num_last
    last = TokenizedExample(turns[-1].prompt, tuple(turn.labels for turn in turns[num_earlier:]))
    if not num_earlier:
        return [last]
    if not is_packed:
        return [*(TokenizedExample(turn.prompt, (turn.labels,)) for turn in turns[:num_earlier]), last]
    # The first of several last answers is packed with the earlier ones.
    chain = turns[: num_earlier + 1]
    start = len(chain[0].prompt)
    whole = (*chain[-1].prompt, *chain[-1].labels)
    spans = tuple((len(turn.prompt) - start, turn.length - start) for turn in chain)
    packed = TokenizedExample(chain[0].prompt, (whole[start:],), turns=spans)
    others = last.targets[1:]
    return [packed, *([replace(last, targets=others)] if others else [])]
