"""Which of several memories a question is about: the one with the stored question that shares most with it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix

_WORD = re.compile(r"\w+")


def nearest(texts: Sequence[str]) -> Callable[[str], int | None]:
    """Tells which of some texts shares most with another: rare words count more; None: it shares no word with any.

    A word counts by the logarithm of how few texts have it.

    >>> [nearest(["The owl flies.", "The fox runs."])(text) for text in ("Where is the fox?", "Who flies?", "Why?")]
    [1, 0, None]
    """
    words = [_words(text) for text in texts]
    counts = Counter(word for own in words for word in own)
    weight = {word: math.log(1 + len(texts) / count) for word, count in counts.items()}

    def find(text: str) -> int | None:
        asked = _words(text)
        scores = [sum(weight[word] for word in sorted(asked & own)) for own in words]
        best = max(range(len(scores)), key=scores.__getitem__)
        return best if scores[best] else None

    return find


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}


def router(memories: Sequence[Prefix], names: Sequence[str]) -> Callable[[str], int | None]:
    """Tells by their stored questions which of some memories a text is about; None: none of them.

    Args:
        memories: At least one.
        names: What to call each in messages.

    Raises:
        ConfigError: One has no questions stored with it.
    """
    stored = [(number, pair[0]) for number, one in enumerate(memories) for pair in one.header.get("questions", ())]
    if missing := [name for number, name in enumerate(names) if number not in {owner for owner, _ in stored}]:
        hint = "make it with `prefixtune distill --document`, which stores them."
        raise ConfigError(f"{missing[0]} stores no questions to route texts by.", hint=hint)
    find = nearest([question for _, question in stored])

    def route(text: str) -> int | None:
        at = find(text)
        return None if at is None else stored[at][0]

    return route
