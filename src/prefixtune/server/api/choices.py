"""Choices in the shape of OpenAI's completions and chats, whole and in pieces, with logprobs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.sampling.detokenizer import Detokenizer

_MIN_LOGPROB = -9999.0
"""The logarithm of zero: JSON has no infinity."""


@dataclass
class _Text:
    """How far one text is: what its tokens add to it, what it begins with, where its next token is, and if it began."""

    pieces: Detokenizer
    prompt: str
    end: int
    begun: bool = False


class CompletionChoices:
    """The choices of `text_completion`.

    Args:
        backbone: Whose tokens they are.
        prompts: Texts that the texts begin with, the same number of texts with each; None: they do not.
        n: Texts for each prompt.
        has_offsets: Whether texts are returned as they were generated. Else `text_offset` is empty.
    """

    id_prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(
        self, backbone: Backbone, prompts: Sequence[str] | None = None, n: int = 1, *, has_offsets: bool = True
    ) -> None:
        self.backbone, self.decode = backbone, token_decoder(backbone)
        self.prompts, self.n, self.has_offsets = prompts, n, has_offsets
        self.texts: dict[int, _Text] = {}

    def whole(self, index: int, output: SequenceOutput, target: str) -> dict[str, Any]:
        """The choice of a whole text."""
        (choice,) = self.pieces(index, output, target)
        return choice

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What precedes the first piece: nothing."""
        return []

    def pieces(self, index: int, output: SequenceOutput, target: str) -> list[dict[str, Any]]:
        """A piece, with the finish reason if it is the last one."""
        if index not in self.texts:
            # The text of an encoder-decoder follows none.
            context = _word(self.backbone) if self.backbone.kind == "decoder" else ()
            prompt = "" if self.prompts is None else self.prompts[index // self.n]
            pieces = Detokenizer(self.backbone.decode, verbatim=True, context=context)
            self.texts[index] = _Text(pieces, prompt, len(prompt))
        text = self.texts[index]
        logprobs = self._logprobs(text, output)
        if not text.begun:
            text.begun, target = True, text.prompt + target
        if not target and logprobs is None and output.finish_reason is None:
            return []
        return [{"index": index, "text": target, "logprobs": logprobs, "finish_reason": output.finish_reason}]

    def _logprobs(self, text: _Text, output: SequenceOutput) -> dict[str, list[Any]] | None:
        """The tokens by name, their logprobs, and where in the text they begin."""
        tokens = [*output.prompt_tokens, *output.tokens]
        if not output.prompt_tokens and all(token.logprob is None for token in tokens):
            return None
        names = [self.decode(token.id) for token in tokens]
        if output.prompt_tokens or not (self.backbone.kind == "decoder" or text.begun):
            names[0] = _decode(self.backbone, [tokens[0].id])
        return {
            "tokens": names,
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top_logprobs(token, name) for token, name in zip(tokens, names, strict=True)],
            "text_offset": self._offsets(text, output, names) if self.has_offsets else [],
        }

    def _offsets(self, text: _Text, output: SequenceOutput, names: Sequence[str]) -> list[int]:
        offsets, end, of_prompt = list[int](), 0, Detokenizer(self.backbone.decode, verbatim=True)
        for token, name in zip(output.prompt_tokens, names, strict=False):
            offsets.append(min(end, len(text.prompt)))
            piece = of_prompt.add(token.id)
            # A prompt that was decoded has its special tokens, by name.
            end += len(name if text.prompt.startswith(name, end) else piece)
        for token in output.tokens:
            offsets.append(text.end)
            text.end += len(text.pieces.add(token.id))
        return offsets

    def _top_logprobs(self, token: Token, text: str) -> dict[str, float] | None:
        """The likeliest tokens and the token itself, by their texts; of tokens with the same text the likeliest."""
        if token.logprob is None:
            return None
        by_text = {text: _finite(token.logprob)}
        for other, logprob in token.top_logprobs:
            by_text.setdefault(self.decode(other) if other != token.id else text, _finite(logprob))
        return by_text


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
        # Of a part of a character they are not known.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def token_decoder(backbone: Backbone) -> Callable[[int], str]:
    """A function: token id -> its text within a text, special tokens by name.

    Some tokenizers leave out the white space that a text begins with, so tokens are decoded after another one. Their
    text is cached, as the same tokens come again and again.
    """
    before = _word(backbone)
    beginning = _decode(backbone, before)

    @functools.lru_cache(maxsize=10_000)
    def decode(token_id: int) -> str:
        text = _decode(backbone, [*before, token_id])
        return text[len(beginning) :] if text.startswith(beginning) else _decode(backbone, [token_id])

    return decode


def _word(backbone: Backbone) -> list[int]:
    """Tokens of a text that others follow; encoded once, as only the tokenizer's thread may encode later."""
    if "before_token" not in backbone.tokenizer_cache:
        backbone.tokenizer_cache["before_token"] = backbone.encode("a")
    word: list[int] = backbone.tokenizer_cache["before_token"]
    return word


def _decode(backbone: Backbone, ids: Sequence[int]) -> str:
    return str(backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _finite(logprob: float | None) -> float:
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)
