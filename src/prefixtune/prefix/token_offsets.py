"""Where tokens begin within a target, from where they begin within the output that the target is taken from.

Shared by the servers of OpenAI's completions, whose `logprobs` give a `text_offset` for each token. Knows nothing of
tokenizers.
"""

from __future__ import annotations

from typing import Any

from prefixtune.prefix.text_format import TextFormat

__all__ = ["TargetOffsets"]


class TargetOffsets:
    """Moves the offsets of one text's `logprobs`, which may come in pieces.

    In a stream a token's entries are held back until the text that it begins in is given: before that, nobody knows
    how much of the output the format takes off.

    >>> offsets = TargetOffsets(TextFormat(target="<<{target}>>"))
    >>> logprobs = {"tokens": ["<<", "Aro", "mi", ">>"], "text_offset": [0, 2, 5, 7]}
    >>> offsets.add("Aromi", logprobs, last=True)
    {'tokens': ['<<', 'Aro', 'mi', '>>'], 'text_offset': [0, 0, 3, 5]}

    Args:
        text_format: Of the output.
    """

    def __init__(self, text_format: TextFormat) -> None:
        self._format, self._given = text_format, 0
        self._taken_off: int | None = None
        self._held: dict[str, list[Any]] = {}

    def add(self, target: str, logprobs: dict[str, Any] | None, *, last: bool) -> dict[str, Any] | None:
        """The entries whose text is given now; None: there are none.

        Args:
            target: A piece of the target.
            logprobs: Lists of equal lengths for the tokens that came with it, `tokens` and `text_offset` among them.
            last: Nothing follows.
        """
        self._given += len(target)
        for name, values in (logprobs or {}).items():
            self._held.setdefault(name, []).extend(values)
        if not self._held or not (self._given or last):
            return None
        if self._taken_off is None:
            self._taken_off = self._begin("".join(self._held["tokens"]))
        offsets = [max(offset - self._taken_off, 0) for offset in self._held["text_offset"]]
        count = len(offsets) if last else sum(offset < self._given for offset in offsets)
        ready = {name: values[:count] for name, values in self._held.items()}
        ready["text_offset"] = [min(offset, self._given) for offset in offsets[:count]]
        self._held = {name: values[count:] for name, values in self._held.items()}
        return ready if count else None

    def _begin(self, output: str) -> int:
        """How many characters of the output stand before the target (see `TextFormat.extract_target`).

        The output is that of the tokens, which the offsets count in; an engine's text may lack its outer space.
        """
        output = output.rstrip()
        return len(output) - len(output.lstrip().removeprefix(self._format.target_words[0]).lstrip())
