"""Choices in the shape of OpenAI's completions and chats, whole and in pieces, with logprobs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.prefix.target_stream import TargetOffsets
from prefixtune.prefix.text_format import TextFormat

__all__ = ["ChatChoices", "CompletionChoices"]


_MIN_LOGPROB = -9999.0
"""The logarithm of zero: JSON has no infinity."""


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
        self.text_ends: dict[int, int] = {}
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
        if self.text_format is None:
            return logprobs
        offsets = self.target_offsets.setdefault(index, TargetOffsets(self.text_format))
        return offsets.add(target, logprobs, last=last)

    def _prompt(self, index: int) -> str:
        """What a text begins with."""
        return "" if self.prompts is None else self.prompts[index // self.n]

    def _logprobs(self, index: int, output: SequenceOutput) -> dict[str, Any] | None:
        tokens = [*output.prompt_tokens, *output.tokens]
        if not output.prompt_tokens and not any(token.logprob is not None for token in tokens):
            return None
        texts = [self.decode(token.id) for token in tokens]
        if output.prompt_tokens or (self.backbone.kind != "decoder" and index not in self.text_ends):
            texts[0] = _decode(self.backbone, [tokens[0].id])
        offsets, end = [], self.text_ends.get(index, 0)
        num_prompt, prompt_length = len(output.prompt_tokens), len(self._prompt(index))
        for number, text in enumerate(texts):
            # A prompt may be shorter than its tokens: by special ones, and by those with part of a character.
            if number == num_prompt and num_prompt:
                end = prompt_length
            offsets.append(min(end, prompt_length) if number < num_prompt else end)
            end += len(text)
        self.text_ends[index] = end if output.tokens else prompt_length
        return {
            "tokens": texts,
            "token_logprobs": [None if token.logprob is None else _finite(token.logprob) for token in tokens],
            "top_logprobs": [self._top_logprobs(token, text) for token, text in zip(tokens, texts, strict=True)],
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


class ChatChoices:
    """The choices of `chat.completion`.

    Args:
        backbone: Whose tokens they are.
    """

    id_prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, backbone: Backbone) -> None:
        self.decode = token_decoder(backbone)

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
        # Part of a character has no text of its own, and its bytes are unknown.
        data = None if "\ufffd" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}


def token_decoder(backbone: Backbone) -> Callable[[int], str]:
    """A function: token id -> its text within a text, special tokens by name.

    Some tokenizers leave out the white space that a text begins with, so a token is decoded after another one. Its text
    is cached, as the same tokens come again and again.
    """
    if "before_token" not in backbone.tokenizer_cache:
        backbone.tokenizer_cache["before_token"] = backbone.encode("a")
    before: list[int] = backbone.tokenizer_cache["before_token"]
    beginning = _decode(backbone, before)

    @functools.lru_cache(maxsize=10_000)
    def decode(token_id: int) -> str:
        text = _decode(backbone, [*before, token_id])
        return text[len(beginning) :] if text.startswith(beginning) else _decode(backbone, [token_id])

    return decode


def _decode(backbone: Backbone, ids: Sequence[int]) -> str:
    return str(backbone.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def _finite(logprob: float | None) -> float:
    return _MIN_LOGPROB if logprob is None else max(logprob, _MIN_LOGPROB)
