"""What is asked of the engine, what comes back, and where a text that is being written stands.

Knows nothing of models, slots and schedules.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.checkpoint import as_prefix
from prefixtune.config import check_names, fit_types
from prefixtune.errors import ConfigError, RequestError, describe_value
from prefixtune.prefix import Prefix

__all__ = ["FullError", "Output", "Request", "Sampling", "TextSoFar", "Token", "TokenSequence"]

_numbers = itertools.count(1)


class FullError(RequestError):
    """The engine takes no request now; the same one may be taken later."""


@dataclass(frozen=True)
class Sampling:
    """How the tokens of a request are chosen.

    Attributes:
        max_new_tokens: Most tokens to write.
        min_new_tokens: Fewest before the end token may come; with `max_new_tokens`: exactly so many.
        temperature: 0: greedy; above: sample.
        top_k: Sample from the k likeliest; 0: all.
        top_p: Sample from the likeliest that together reach p.
        seed: Of sampling; None: not reproducible.
        stop: Strings that end a text, and are left out of it.
        repetition_penalty: Above 1 discourages tokens that the text has already.
        logprobs: How many of the likeliest tokens to tell at each place, with the chosen one; None: tell none.
        banned: Tokens that are never chosen.

    Raises:
        RequestError: Values that are not allowed; all faults at once.
    """

    max_new_tokens: int = 100
    min_new_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    repetition_penalty: float = 1.0
    logprobs: int | None = None
    banned: tuple[int, ...] = ()

    def __new__(cls, *_: Any, **values: Any) -> Sampling:
        """Refuse unknown names, with the nearest known one."""
        try:
            check_names(cls, values, "there is no such sampling option", "leave it out.")
        except ConfigError as error:
            raise RequestError(error.message, hint=error.hint) from None
        return super().__new__(cls)

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        if wrong := fit_types(self):
            raise RequestError("; ".join(wrong.values()) + ".", hint="leave the option out to have its default.")
        rules = [
            (self.max_new_tokens >= 1, "max_new_tokens", "at least 1"),
            (0 <= self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "between 0 and max_new_tokens"),
            (math.isfinite(self.temperature) and self.temperature >= 0, "temperature", "0 (greedy) or above"),
            (self.top_k >= 0, "top_k", "0 (all) or above"),
            (0 < self.top_p <= 1, "top_p", "above 0 and at most 1"),
            (all(self.stop), "stop", "strings that are not empty"),
            (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0, "repetition_penalty", "above 0"),
            (all(token >= 0 for token in self.banned), "banned", "token ids"),
            (self.logprobs is None or 0 <= self.logprobs <= 20, "logprobs", "between 0 and 20"),
        ]
        faults = [
            f"{name} is {getattr(self, name)!r}, but must be {allowed}" for good, name, allowed in rules if not good
        ]
        if faults:
            raise RequestError("; ".join(faults) + ".", hint="leave the option out to have its default.")


@dataclass(frozen=True, eq=False)
class Request:
    """One or several texts to be written after a prompt, with one prefix.

    Attributes:
        prompt: Token ids of what stands before.
        prefix: In front of the prompt: a `Prefix`, or a path, which is read; None: the bare model.
        sampling: How tokens are chosen: a `Sampling`, or a dict of its fields.
        n: Texts to write; each draws from a seed of its own.
        tenant: For whom; the engine admits tenants in turn.
        prefix_name: What the prefix is called, for who looks at the running batch.
        verbatim: Tell the white space around a text, too.
        id: A name; made where none is given.

    Raises:
        RequestError: The prompt is empty or holds no token ids, n is below 1, or `sampling` is something else.
    """

    prompt: tuple[int, ...]
    prefix: Prefix | None = None
    sampling: Sampling = field(default_factory=Sampling)
    n: int = 1
    tenant: str = ""
    prefix_name: str = ""
    verbatim: bool = False
    id: str = field(default_factory=lambda: f"request-{next(_numbers)}")

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "prompt", tuple(map(operator.index, self.prompt)))
        except TypeError:
            raise RequestError(
                f"the prompt is {describe_value(self.prompt)}, but must be a list of token ids.",
                hint="encode a text with the backbone: `backbone.encode(text)`.",
            ) from None
        object.__setattr__(self, "prefix", as_prefix(self.prefix))
        if isinstance(self.sampling, Mapping):
            object.__setattr__(self, "sampling", Sampling(**self.sampling))
        if not isinstance(self.sampling, Sampling):
            raise RequestError(
                f"sampling is {describe_value(self.sampling)}, but must be a Sampling or a dict.",
                hint="write Sampling(max_new_tokens=20), say.",
            )
        if not self.prompt:
            raise RequestError("the prompt has no token.", hint="give some text.")
        if self.n < 1:
            raise RequestError(f"n is {self.n}, but must be at least 1.", hint="leave it out for one text.")

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()


@dataclass(frozen=True)
class Token:
    """One token that was chosen.

    Attributes:
        id: The token.
        logprob: Its log-probability under the model, before temperature; None: not asked for.
        likeliest: The likeliest tokens there and their log-probabilities, the best first.
    """

    id: int
    logprob: float | None = None
    likeliest: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Output:
    """News of a request: what was added to one of its texts.

    Attributes:
        request: The request's id.
        index: Which of its n texts.
        tokens: The tokens chosen since the last news; the end token is not among them.
        text: What they add to the text, as far as it can no longer change.
        finished: None: it goes on; `stop` (the end token or a stop string), `length`, `cancelled`, `timeout` or
            `error`.
        error: What went wrong, where `finished` is `error`.
        crashed: The whole engine went wrong, and not this request: it may be asked again.
    """

    request: str
    index: int
    tokens: tuple[Token, ...]
    text: str
    finished: str | None = None
    error: str = ""
    crashed: bool = False


class TextSoFar:
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
        computed: How many of its tokens have their keys and values in the slot.
        to_encode: How many of the prompt's tokens an encoder has still to read.
        ids: What is written after (the prompt, or `start`), then what was written, without the end token.
        finished: As in `Output`.
    """

    request: Request
    index: int
    text: TextSoFar
    start: int | None = None
    first: int | None = None
    slot: int = -1
    computed: int = 0
    to_encode: int = field(init=False)
    ids: list[int] = field(init=False)
    finished: str | None = None

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
        return self.computed if self.start is None else len(self.request.prompt) - self.to_encode + self.num_new

    @property
    def rest(self) -> int:
        """Tokens that are still to be computed before the next one can be chosen."""
        return len(self.ids) - self.computed
