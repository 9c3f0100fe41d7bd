"""Where tokens begin within a target, from where they begin within the output that the target is taken from.

Shared by the servers of OpenAI's completions, whose `logprobs` give a `text_offset` for each token. Knows nothing of
tokenizers.
"""

from __future__ import annotations

from typing import Any

from prefixtune.text_format import TextFormat

__all__ = ["TargetOffsets"]


class TargetOffsets:
    """Moves the offsets of one text's `logprobs`, which may come in pieces.

    In a stream a token's entries are held back until the text that it begins in is given: before that, nobody knows
    how much of the output the format takes off.

    >>> offsets = TargetOffsets(TextFormat(target="<<{target}>>"))
    >>> logprobs = {"tokens": ["<<", "Aro", "mi", ">>"], "text_offset": [0, 2, 5, 7]}
    >>> offsets.add("<<Aromi>>", "Aromi", logprobs, last=True)
    {'tokens': ['<<', 'Aro', 'mi', '>>'], 'text_offset': [0, 0, 3, 5]}

    Args:
        text_format: Of the output.
    """

    def __init__(self, text_format: TextFormat) -> None:
        self._format = text_format
        self._output, self._given = "", 0
        self._taken_off: int | None = None
        self._held: dict[str, list[Any]] = {}

    def add(self, output: str, target: str, logprobs: dict[str, Any] | None, *, last: bool) -> dict[str, Any] | None:
        """The entries whose text is given now; None: there are none.

        Args:
            output: A piece of the output.
            target: What is given of the target with it.
            logprobs: Lists of equal lengths, `text_offset` among them, for the piece's tokens.
            last: Nothing follows.
        """
        self._given += len(target)
        if self._taken_off is None:
            self._output += output
            if self._given or last:
                self._taken_off = self._begin()
        for name, values in (logprobs or {}).items():
            self._held.setdefault(name, []).extend(values)
        if self._taken_off is None or not self._held:
            return None
        offsets = [max(offset - self._taken_off, 0) for offset in self._held["text_offset"]]
        count = len(offsets) if last else sum(offset < self._given for offset in offsets)
        ready = {name: values[:count] for name, values in self._held.items()}
        ready["text_offset"] = [min(offset, self._given) for offset in offsets[:count]]
        self._held = {name: values[count:] for name, values in self._held.items()}
        return ready if count else None

    def _begin(self) -> int:
        """How many characters of the output stand before the target (see `TextFormat.extract_target`)."""
        output = self._output.rstrip()
        return len(output) - len(output.lstrip().removeprefix(self._format.target_words[0]).lstrip())
