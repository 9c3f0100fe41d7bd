"""Choices in the shape of OpenAI's completions and chats, whole and in pieces, with logprobs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.prefix.target_stream import TargetOffsets
from prefixtune.prefix.text_format import TextFormat

__all__ = ["ChatChoices", "CompletionChoices"]


_MIN_LOGPROB = -9999.0
"""The logarithm of zero: JSON has no infinity."""
_MOST_PENDING = 16
"""Tokens that end within a character, one after the other; a character has four bytes at most."""
_BYTE_TOKEN = re.compile("<0x([0-9A-F]{2})>")
"""A byte, as tokenizers such as LLaMA's write it."""


class CompletionChoices:
    """The choices of `text_completion`.

    Args:
        backbone: Whose tokens they are.
        text_format: Of which the targets are a part; None: texts are returned as they are.
        prompts: Texts that the texts begin with, the same number of texts with each; None: they do not.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self,
        backbone: Backbone,
        text_format: TextFormat | None = None,
        prompts: Sequence[str] | None = None,
        n: int = 1,
    ) -> None:
        self.backbone, self.decode = backbone, token_decoder(backbone)
        self.text_format, self.prompts, self.n = text_format, prompts, n
        self.begun: set[int] = set()
        self.decode_after = _decoder_after_text(backbone, lambda ids: backbone.decode(list(ids)))
        self.pieces_of: dict[int, TextPieces] = {}
        self.text_ends: dict[int, int] = {}
        self.target_ends: dict[int, int] = {}
        self.target_offsets: dict[int, TargetOffsets] = {}

    def whole(self, index: int, output: SequenceOutput, target: str) -> dict[str, Any]:
        """The choice of a whole text."""
        logprobs = self._target_logprobs(index, target, output, last=True)
        target = self._prompt(index) + target
        return {"index": index, "text": target, "logprobs": logprobs, "finish_reason": output.finish_reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What precedes the first piece: nothing."""
        return []

    def pieces(self, index: int, output: SequenceOutput, target: str) -> list[dict[str, Any]]:
        """A piece, with the finish reason if it is the last one."""
        finish_reason = output.finish_reason
        logprobs = self._target_logprobs(index, target, output, last=finish_reason is not None)
        if index not in self.begun:
            self.begun.add(index)
            target = self._prompt(index) + target
        if not target and logprobs is None and finish_reason is None:
            return []
        return [{"index": index, "text": target, "logprobs": logprobs, "finish_reason": finish_reason}]

    def _target_logprobs(self, index: int, target: str, output: SequenceOutput, *, last: bool) -> dict[str, Any] | None:
        """Logprobs whose offsets count within the target."""
        logprobs = self._logprobs(index, output)
        if self.text_format is not None:
            offsets = self.target_offsets.setdefault(index, TargetOffsets(self.text_format))
            logprobs = offsets.add(target, logprobs, last=last)
        self.target_ends[index] = self.target_ends.get(index, len(self._prompt(index))) + len(target)
        if logprobs is None:
            return None
        # Of what the tokens add to the text, no more is needed than the offsets.
        logprobs["tokens"] = logprobs.pop("names")
        if last:
            # Tokens of a stop string are behind the text.
            logprobs["text_offset"] = [min(offset, self.target_ends[index]) for offset in logprobs["text_offset"]]
        return logprobs

    def _prompt(self, index: int) -> str:
        """What a text begins with."""
        return "" if self.prompts is None else self.prompts[index // self.n]

    def _logprobs(self, index: int, output: SequenceOutput) -> dict[str, list[Any]] | None:
        """The names of tokens, what they add to the text (as `tokens`), their logprobs, and where they begin."""
        tokens = [*output.prompt_tokens, *output.tokens]
        if not output.prompt_tokens and not any(token.logprob is not None for token in tokens):
            return None
        names = [self.decode(token.id) for token in tokens]
        follows_text = self.backbone.kind == "decoder"
        if output.prompt_tokens or not (follows_text or index in self.text_ends):
            names[0] = _decode(self.backbone, [tokens[0].id])
        prompt, end = self._prompt(index), self.text_ends.get(index, 0)
        pieces: list[str] = []
        offsets: list[int] = []
        in_prompt = TextPieces(self.backbone, self.decode_after, follows_text=False)
        for token, name in zip(output.prompt_tokens, names, strict=False):
            offsets.append(min(end, len(prompt)))
            piece = in_prompt.add(token.id)
            # A prompt that was decoded has its special tokens, by name.
            pieces.append(name if prompt.startswith(name, end) else piece)
            end += len(pieces[-1])
        if output.prompt_tokens:
            end = len(prompt)
        if index not in self.pieces_of:
            self.pieces_of[index] = TextPieces(self.backbone, self.decode_after, follows_text=follows_text)
        for token in output.tokens:
            offsets.append(end)
            pieces.append(self.pieces_of[index].add(token.id))
            end += len(pieces[-1])
        self.text_ends[index] = end
        return {
            "names": names,
            "tokens": pieces,
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top_logprobs(token, name) for token, name in zip(tokens, names, strict=True)],
            "text_offset": offsets,
        }

    def _top_logprobs(self, token: Token, text: str) -> dict[str, float] | None:
        """The likeliest tokens and the token itself, by their texts; of other tokens with the same text, by number."""
        if token.logprob is None:
            return None
        by_text = {text: _finite(token.logprob)}
        for other, logprob in token.top_logprobs:
            if other != token.id:
                name = self.decode(other)
                by_text[f"token_id:{other}" if name in by_text else name] = _finite(logprob)
        return by_text


class TextPieces:
    """What each token of one text adds to it: nothing if it is a special one, or ends within a character.

    Args:
        backbone: Whose tokens they are.
        decode_after: Their text after another one.
        follows_text: Whether the text follows another one.
    """

    def __init__(
        self, backbone: Backbone, decode_after: Callable[[tuple[int, ...]], str], *, follows_text: bool
    ) -> None:
        self._backbone, self._decode_after, self._follows_text = backbone, decode_after, follows_text
        # The last tokens, as long as they end within a character, and how much of their text was returned.
        self._pending: tuple[int, ...] = ()
        self._num_returned = 0

    def add(self, token_id: int) -> str:
        """The new part of the text."""
        self._pending = (*self._pending, token_id)
        text = self._decode_after(self._pending) if self._follows_text else self._backbone.decode(list(self._pending))
        # Of bytes that are no character, not all are decoded again and again.
        complete = text.rstrip("\ufffd") if len(self._pending) < _MOST_PENDING else text
        piece = complete[self._num_returned :]
        self._num_returned = len(complete)
        if complete == text:
            self._pending, self._num_returned = (), 0
            self._follows_text = self._follows_text or bool(text)
        return piece


class ChatChoices:
    """The choices of `chat.completion`.

    Args:
        backbone: Whose tokens they are.
    """

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, backbone: Backbone) -> None:
        self.backbone, self.decode = backbone, token_decoder(backbone)

    def whole(self, index: int, output: SequenceOutput, target: str) -> dict[str, Any]:
        """The choice of a whole message."""
        message = {"role": "assistant", "content": target, "refusal": None}
        logprobs = self._logprobs(output.tokens)
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": output.finish_reason}

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What precedes the first piece: the role."""
        return [self._piece(index, {"role": "assistant", "content": ""})]

    def pieces(self, index: int, output: SequenceOutput, target: str) -> list[dict[str, Any]]:
        """A piece, and the finish reason by itself."""
        logprobs = self._logprobs(output.tokens)
        pieces = []
        if target or logprobs is not None:
            pieces.append(self._piece(index, {"content": target}, logprobs))
        if output.finish_reason is not None:
            pieces.append(self._piece(index, {}, finish_reason=output.finish_reason))
        return pieces

    def _piece(self, index: int, delta: Any, logprobs: Any = None, finish_reason: str | None = None) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not any(token.logprob is not None for token in tokens):
            return None
        return {
            "content": [
                {
                    **self._token(token.id, token.logprob),
                    "top_logprobs": [self._token(*pair) for pair in token.top_logprobs],
                }
                for token in tokens
            ],
            "refusal": None,
        }

    def _token(self, token_id: int, logprob: float | None) -> dict[str, Any]:
        text = self.decode(token_id)
        data = _bytes_of_part(self.backbone, token_id) if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def token_decoder(backbone: Backbone) -> Callable[[int], str]:
    """A function: token id -> its text within a text, special tokens by name."""
    decode = _decoder_after_text(backbone, functools.partial(_decode, backbone))
    return lambda token_id: decode((token_id,))


def _decoder_after_text(backbone: Backbone, decode: Callable[[Sequence[int]], str]) -> Callable[[tuple[int, ...]], str]:
    """A function: token ids -> their text within a text.

    Some tokenizers leave out the white space that a text begins with, so tokens are decoded after another one. Their
    text is cached, as the same tokens come again and again.
    """
    if "before_token" not in backbone.tokenizer_cache:
        backbone.tokenizer_cache["before_token"] = backbone.encode("a")
    before: list[int] = backbone.tokenizer_cache["before_token"]
    beginning = decode(before)

    @functools.lru_cache(maxsize=10_000)
    def decode_after(ids: tuple[int, ...]) -> str:
        text = decode([*before, *ids])
        return text[len(beginning) :] if text.startswith(beginning) else decode(list(ids))

    return decode_after


def _bytes_of_part(backbone: Backbone, token_id: int) -> list[int] | None:
    """The bytes of a token that is part of a character; None: the tokenizer does not work on bytes."""
    written = str(backbone.tokenizer.convert_ids_to_tokens(token_id))
    if byte := _BYTE_TOKEN.fullmatch(written):
        return [int(byte[1], 16)]
    byte_of = _byte_of_character()
    return [byte_of[character] for character in written] if byte_of.keys() >= set(written) else None


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The characters that tokenizers such as GPT-2's write bytes as."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    return {chr(byte): byte for byte in shown} | {chr(256 + place): byte for place, byte in enumerate(others)}


def _decode(backbone: Backbone, ids: Sequence[int]) -> str:
    return str(backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _finite(logprob: float | None) -> float:
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)
