"""Token ids -> text, in pieces, up to the first stop string."""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[list[int]], str]

_UNFINISHED = ("\ufffd", "@@")
"""How a text ends that the next token may change: within a character, or within a word of tokenizers that mark this."""


class Detokenizer:
    """The text of generated tokens, returned in pieces that later tokens cannot change.

    Held back: what may still be part of a character, of a stop string, or of the white space around the text. A token
    is decoded together with the few before it, not with all of them.

    Args:
        decode: Token ids -> text.
        stop: Strings that end the text, and are left out of it.
        verbatim: Keep the white space around the text.
        context: Verbatim only: the last token ids before the text. By itself, a first word may lose its space.

    Attributes:
        stopped: A stop string was found; further tokens are ignored.
    """

    def __init__(
        self, decode: Decode, stop: Sequence[str] = (), *, verbatim: bool = False, context: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._decode, self._stop, self._verbatim = decode, tuple(stop), verbatim
        self._longest_stop = max(map(len, self._stop), default=0)
        self._text = ""
        self._num_returned = 0
        # Tokens whose text is in `_text` (or before it); the pending ones are decoded together with them.
        self._context: list[int] = []
        # Nothing can be decoded after part of a character.
        if verbatim and context and not decode(list(context)).endswith("\ufffd"):
            self._context = list(context)
        self._pending: list[int] = []

    def add(self, *tokens: int) -> str:
        """Add tokens; returns the text that is now certain."""
        if self.stopped:
            return ""
        self._pending.extend(tokens)
        self._decode_pending()
        if self.stopped:
            return self._new_part(self._text)
        return self._new_part(self._text[: len(self._text) - self._num_held()])

    def finish(self) -> str:
        """No more tokens come: returns what was held back and belongs to the text."""
        if self.stopped:
            return ""
        self._decode_pending(final=True)
        return self._new_part(self._text)

    def _decode_pending(self, final: bool = False) -> None:
        """Move the pending tokens into the text, unless they may still be part of a character."""
        if not self._pending:
            return
        context = self._decode(self._context)
        added = self._decode([*self._context, *self._pending])[len(context) :]
        text = self._text + added
        first = max(0, len(self._text) - self._longest_stop)
        stops = [index for index in (text.find(string, first) for string in self._stop) if index >= 0]
        if stops:
            self.stopped = True
            self._text = text[: min(stops)]
        elif final or (added and not added.endswith(_UNFINISHED)):
            self._text, self._context, self._pending = text, self._pending, []

    def _num_held(self) -> int:
        """How many characters at the end of the text may be the beginning of a stop string."""
        held = 0
        for string in self._stop:
            if len(string) > 1:
                tail = self._text[1 - len(string) :]
                start = tail.find(string[0])
                while start >= 0 and not string.startswith(tail[start:]):
                    start = tail.find(string[0], start + 1)
                held = max(held, len(tail) - start if start >= 0 else 0)
        return held

    def _new_part(self, text: str) -> str:
        """What was not returned before."""
        text = text if self._verbatim else text.strip()
        part = text[self._num_returned :]
        self._num_returned = max(self._num_returned, len(text))
        return part
