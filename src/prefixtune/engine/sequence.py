"""One text that is being generated."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from prefixtune.engine.request import FinishReason, Request
from prefixtune.inference.detokenizer import Detokenizer

__all__ = ["TokenSequence"]


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
