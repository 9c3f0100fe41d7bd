"""How much of a text a tokenizer reads: no more than could matter."""

from __future__ import annotations

from typing import Protocol

from prefixtune.errors import RequestError

__all__ = ["bounded"]


_CHARACTERS = 6
"""Of a token, more than in most texts; where a text has more, a longer beginning is tried."""
_MARGIN = 64
"""Tokens that a beginning may have more than the whole text has there, as it ends within a word."""


class _Encodes(Protocol):
    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""


def bounded(tokenizer: _Encodes, text: str, positions: int | None) -> str:
    """A text; of one that cannot fit, a beginning that cannot fit either: its tokens are too many, or are cut anyway.

    Every text from outside goes through here before it is tokenized, in training, in inference and in the servers: a
    tokenizer takes a second and 350 MB for a megabyte, and a model's positions hold a small part of it. No number of
    characters per token is safe for all tokenizers (a thousand spaces may be one token), so a beginning is measured.

    Args:
        tokenizer: Makes token ids of a text: a backbone, or what a server knows of one.
        text: A source, a message or a target, or a whole prompt.
        positions: Most tokens that could fit; None: any number, so that nothing is too long.

    Raises:
        RequestError: It holds half a surrogate pair.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RequestError(
            f"a text holds half a surrogate pair at position {error.start}, which is no character.",
            hint="write UTF-8 text.",
        ) from None
    if positions is None:
        return text
    size = max(_CHARACTERS * positions, 1024)
    while size < len(text):
        if len(tokenizer.encode(text[:size])) > positions + _MARGIN:
            return text[:size]
        size *= 2
    return text
