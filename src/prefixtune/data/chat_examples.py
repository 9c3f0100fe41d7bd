"""Conversations -> tokenized examples to train on.

Every answer of the assistant is a target. A conversation whose turns continue each other is one example, whose turns
are the parts of its only target that are labels. Otherwise each turn is an example of its own: so it is where the
template writes earlier answers in another way, and where a conversation has several last answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.chat import Turn, encode_conversation
from prefixtune.data.examples import Example, conversation_of
from prefixtune.data.tokenized import TokenizedDataset, TokenizedExample
from prefixtune.data.truncation import fit_source
from prefixtune.errors import RequestError
from prefixtune.prefix.text_format import TextFormat, TruncationPolicy

TurnsAs = Literal["packed", "separate", "last"]
"""How a conversation becomes examples: computed once, where its template allows that; each turn by itself; or its last
turn alone."""


def encode_conversation_examples(
    backbone: Backbone,
    example: Example,
    text_format: TextFormat,
    limit: int,
    *,
    on_too_long: TruncationPolicy,
    kind: TurnsAs,
) -> TokenizedDataset:
    """Turn a conversation into token ids.

    Of one that is too long, the last turns are left out; where the first turn alone is too long, its user message is
    cut at its end.

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
    fitting, num_turns = _fitting(turns, len(earlier), limit), len(earlier) + num_targets
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


def _fitting(turns: Sequence[Turn], num_earlier: int, limit: int) -> list[Turn]:
    """The first turns, as many as fit; the last answers to one message are kept or left out together."""
    fits = [turn.length <= limit for turn in turns]
    if all(fits):
        return list(turns)
    return list(turns[: min(fits.index(False), num_earlier)])


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
