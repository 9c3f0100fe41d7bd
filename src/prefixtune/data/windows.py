"""A long text -> windows that fit, each after the end of the one before.

A text that is learned as it is (language modelling) has no source that could be cut, and nothing of it is left out:
every token is a label once. A later window begins with the last tokens of the one before, which it only reads.
"""

from __future__ import annotations

from collections.abc import Sequence

from prefixtune.data.examples import Example
from prefixtune.data.tokenized import TokenizedExample
from prefixtune.errors import DataError
from prefixtune.prefix.text_format import TextFormat

TEXT_FORMAT = TextFormat("{separator}{source}", "{target}")
"""A text follows the token that begins texts, with nothing else around it; a beginning to go on with is the source."""
DEFAULT_WINDOW = 512
"""Positions of a window, where `max_length` says nothing; a batch of whole contexts would take much memory."""


def is_text(example: Example) -> bool:
    """Whether an example is a text to learn as it is, with nothing before it."""
    return not example.source and not example.messages and len(example.targets) == 1


def text_windows(prompt: Sequence[int], text: Sequence[int], limit: int) -> list[TokenizedExample]:
    """A text's windows.

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
        raise DataError(
            f"a window of a text has {limit} positions, and {len(prompt)} tokens are before the text.",
            hint="raise max_length, or shorten prompt_format.",
        )
    text = tuple(text)
    windows = [TokenizedExample(tuple(prompt), (text[:room],))]
    start, step = room, limit - max(1, limit // 4)
    while start < len(text):
        labels = text[start : start + step]
        windows.append(TokenizedExample(text[max(0, start - (limit - len(labels))) : start], (labels,)))
        start += len(labels)
    return windows
