"""Sequence."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from prefixtune.engine.request import FinishReason, Request

__all__ = ["Detokenizer", "TokenSequence"]


class Detokenizer:
    """A text from its tokens, told in pieces that can no longer change.

    Held back: what may be part of a character still, of a stop string, or of the white space around the text. A token
    is decoded beside the few before it, not with all of them.

    Args:
        decode: Token ids -> text.
        stop: Strings that end the text.
        verbatim: Tell the white space around the text, too.
        before: Verbatim only: token ids of what the text goes on from. By itself, a first word may lose its space.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        stop: Sequence[str] = (),
        *,
        verbatim: bool = False,
        before: Sequence[int] = (),
    ) -> None:
        self.decode, self.stop, self.verbatim = decode, tuple(stop), verbatim
        self.longest = max(map(len, self.stop), default=0)
        self.whole = ""
        self.given = 0
        self.stopped = False
        # Tokens whose text is in `whole`, kept as what the new ones are decoded beside; and the new ones.
        self.known: list[int] = []
        # What ends within a character is no place to go on from.
        if verbatim and before and not decode(list(before)).endswith("\ufffd"):
            self.known = list(before)
        self.new: list[int] = []

    def add(self, token: int) -> str:
        """Take a token; returns the text that is now certain."""
        self.new.append(token)
        self._settle()
        held = max((n for s in self.stop for n in range(1, len(s)) if self.whole.endswith(s[:n])), default=0)
        return self._give(self.whole if self.stopped else self.whole[: len(self.whole) - held])

    def end(self) -> str:
        """What was held back and belongs to the text after all."""
        if self.stopped:
            return ""
        self._settle(final=True)
        return self._give(self.whole)

    def _settle(self, final: bool = False) -> None:
        """Bring the new tokens into the text, but for those that may be part of a character still."""
        if not self.new:
            return
        before = self.decode(self.known)
        fresh = self.decode([*self.known, *self.new])[len(before) :]
        searched = max(0, len(self.whole) - self.longest)
        whole = self.whole + fresh
        places = [place for place in (whole.find(string, searched) for string in self.stop) if place >= 0]
        if places:
            self.stopped = True
            self.whole = whole[: min(places)]
        elif final or (fresh and not fresh.endswith("\ufffd")):
            self.whole, self.known, self.new = whole, self.new, []

    def _give(self, text: str) -> str:
        # White space at the start is no part of the text; nothing was given before it.
        text = text if self.verbatim else text.strip()
        piece = text[self.given :]
        self.given = max(self.given, len(text))
        return piece


@dataclass(eq=False)
class TokenSequence:
    """One text that is being written.

    Attributes:
        request: For which request.
        index: Which of its texts.
        text: What was written, as text.
        start: What an encoder-decoder's decoder starts from, as the prompt is for its encoder; None: the text goes on
            from the prompt.
        first: The token that every text of the model begins with, whatever the scores; None: there is none.
        slot: Where its keys and values are; -1: it has none yet.
        num_computed_tokens: How many of its tokens have their keys and values in the slot.
        to_encode: How many of the prompt's tokens an encoder has still to read.
        ids: What is written after (the prompt, or `start`), then what was written, without the end token.
        finish_reason: None: it goes on.
    """

    request: Request
    index: int
    text: Detokenizer
    start: int | None = None
    first: int | None = None
    slot: int = -1
    num_computed_tokens: int = 0
    to_encode: int = field(init=False)
    ids: list[int] = field(init=False)
    finish_reason: FinishReason | None = None

    def __post_init__(self) -> None:
        self.ids = list(self.request.prompt) if self.start is None else [self.start]
        self.to_encode = 0 if self.start is None else len(self.request.prompt)
        self.num_given = len(self.ids)
        seed = self.request.sampling.seed
        # Each of a request's texts draws numbers of its own.
        self.random = random.Random(None if seed is None else f"{seed}/{self.index}")

    @property
    def num_new(self) -> int:
        """Tokens that were written."""
        return len(self.ids) - self.num_given

    @property
    def own_ids(self) -> list[int]:
        """The tokens that count as repeated: prompt and text, but not what a decoder starts from."""
        return self.ids if self.start is None else self.ids[1:]

    @property
    def num_read(self) -> int:
        """Of prompt and text: how many tokens were computed."""
        return (
            self.num_computed_tokens if self.start is None else len(self.request.prompt) - self.to_encode + self.num_new
        )

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are still to be computed before the next one can be chosen."""
        return len(self.ids) - self.num_computed_tokens
