"""The target within an output that comes in pieces, and where its tokens start."""

from __future__ import annotations

from typing import Any

from prefixtune.prefix.text_format import TextFormat


class TargetStream:
    """`TextFormat.extract_target` for an output that comes in pieces; joined, the pieces equal it.

    Held back until more is known: white space that may be the last, and everything where the format has words around a
    target, which can only be removed from the complete output.

    >>> stream = TargetStream(TextFormat())
    >>> [stream.add(" Aromi "), stream.add("is a pub. "), stream.add("", last=True)]
    ['Aromi', ' is a pub.', '']

    Args:
        text_format: Of the output.
    """

    def __init__(self, text_format: TextFormat) -> None:
        self._format, self._needs_all = text_format, any(text_format.target_words)
        self._held = ""
        self._started = False

    def add(self, piece: str, *, last: bool = False) -> str:
        """The new part of the target that is certain by now."""
        self._held += piece
        if last:
            ready = self._format.extract_target(self._held) if self._needs_all else self._take()
            self._held = ""
            return ready
        return "" if self._needs_all else self._take()

    def _take(self) -> str:
        text = self._held if self._started else self._held.lstrip()
        ready = text.rstrip()
        self._held = text[len(ready) :]
        self._started = self._started or bool(ready)
        return ready


class TargetOffsets:
    """Moves the offsets of one text's `logprobs`, which may come in pieces.

    In a stream, a token's entries are held back until the text in which it starts is known: before that, it is unknown
    how many characters the format removes in front of the target.

    >>> offsets = TargetOffsets(TextFormat(target="<<{target}>>"))
    >>> logprobs = {"tokens": ["<<", "Aro", "mi", ">>"], "text_offset": [0, 2, 5, 7]}
    >>> offsets.add("Aromi", logprobs, last=True)
    {'tokens': ['<<', 'Aro', 'mi', '>>'], 'text_offset': [0, 0, 3, 5]}

    Args:
        text_format: Of the output.
    """

    def __init__(self, text_format: TextFormat) -> None:
        self._format, self._length = text_format, 0
        self._removed: int | None = None
        self._held: dict[str, list[Any]] = {}

    def add(self, target: str, logprobs: dict[str, Any] | None, *, last: bool) -> dict[str, Any] | None:
        """The entries whose text is known by now; None: there are none.

        Args:
            target: A piece of the target.
            logprobs: Lists of equal lengths for the tokens that came with it, `tokens` and `text_offset` among them.
            last: Whether this is the last piece.
        """
        self._length += len(target)
        for name, values in (logprobs or {}).items():
            self._held.setdefault(name, []).extend(values)
        if not self._held or not (self._length or last):
            return None
        if self._removed is None:
            self._removed = self._count_removed("".join(self._held["tokens"]))
        offsets = [max(offset - self._removed, 0) for offset in self._held["text_offset"]]
        count = len(offsets) if last else sum(offset < self._length for offset in offsets)
        ready = {name: values[:count] for name, values in self._held.items()}
        ready["text_offset"] = [min(offset, self._length) for offset in offsets[:count]]
        self._held = {name: values[count:] for name, values in self._held.items()}
        return ready if count else None

    def _count_removed(self, output: str) -> int:
        """How many characters of the output are before the target (see `TextFormat.extract_target`).

        The output here is the text of the tokens, which the offsets count in; an engine's text may lack outer space.
        """
        output = output.rstrip()
        return len(output) - len(output.lstrip().removeprefix(self._format.target_words[0]).lstrip())
