"""Which of several memories a question is about: the one with the stored question that shares most with it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

from prefixtune.errors import ConfigError

_WORD = re.compile(r"\w+")
_LEAST = 0.45
"""What a text shares with the nearest question, at least, relative to what a word counts that one memory alone has."""


@cache
def general_requests() -> dict[str, Any]:
    """Requests about all kinds of things: `train`, pairs of a request and an answer; `test`, other requests."""
    made: dict[str, Any] = json.loads(files("prefixtune.prefix").joinpath("general.json").read_text("utf-8"))
    return made


def nearest(
    texts: Sequence[str], owners: Sequence[int] = (), *, least: float = 0, others: Sequence[str] = ()
) -> Callable[[str], int | None]:
    """Tells whose text shares most with another; None: it shares nothing that tells one from the rest.

    A word counts by the logarithm of how few owners have it.

    >>> [nearest(["The owl flies.", "The fox runs."])(text) for text in ("Where is the fox?", "Who flies?", "Why?")]
    [1, 0, None]

    Args:
        texts: At least one.
        owners: Of each text; none: each is its own.
        least: What must be shared, relative to what a word counts that one owner alone has.
        others: Texts of one more owner, which is not found.
    """
    owners, words = owners or range(len(texts)), [_words(text) for text in texts]
    pairs = {(owner, word) for owner, own in zip(owners, words, strict=True) for word in own}
    counts = Counter(word for _, word in pairs)
    counts.update(set().union(*map(_words, others)))
    most = math.log(max(len(set(owners)) + bool(others), 2))

    def find(text: str) -> int | None:
        asked = _words(text)
        scores = [math.fsum(most - math.log(counts[word]) for word in asked & own) for own in words]
        best = max(range(len(scores)), key=scores.__getitem__)
        return owners[best] if scores[best] > least * most else None

    return find


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}


def router(headers: Sequence[Mapping[str, Any]], names: Sequence[str]) -> Callable[[str], int | None]:
    """Tells by their stored questions which of some memories a text is about; None: none of them.

    Words of general requests count less, as if one more memory had them.

    Args:
        headers: Of the memories' files, at least one.
        names: What to call each in messages.

    Raises:
        ConfigError: One has no questions stored with it.
    """
    stored = [(number, pair[0]) for number, one in enumerate(headers) for pair in one.get("questions", ())]
    if missing := [name for number, name in enumerate(names) if number not in {owner for owner, _ in stored}]:
        hint = "make it with `prefixtune distill --document`, which stores them."
        raise ConfigError(f"{missing[0]} stores no questions to route texts by.", hint=hint)
    return _router(tuple(text for _, text in stored), tuple(owner for owner, _ in stored))


@lru_cache(maxsize=4)
def _router(texts: tuple[str, ...], owners: tuple[int, ...]) -> Callable[[str], int | None]:
    """Kept, as all stored questions are read for it."""
    general = [request for request, _ in general_requests()["train"]]
    return nearest(texts, owners, least=_LEAST, others=general)
