"""One text that is being generated, and what changes the scores of its next token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.engine.request import FinishReason, Request, SamplingParams, Token
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.sampling.grammar import GrammarState
from prefixtune.sampling.penalties import penalize, penalizes

__all__ = ["LogitRules", "TokenSequence", "has_rules"]


def has_rules(params: SamplingParams) -> bool:
    """Whether the scores of the next token are changed."""
    return bool(params.banned or params.logit_bias) or penalizes(params)


class LogitRules:
    """The rules of one sequence. A token is counted once, so that a step takes the same time in a long text.

    Args:
        params: Of its request.
        prompt: The prompt's tokens, as far as `repetition_penalty` counts them.
        vocab_size: How many scores there are.
        device: Where the scores are.
    """

    def __init__(
        self, params: SamplingParams, prompt: Sequence[int], vocab_size: int, device: torch.device | str
    ) -> None:
        self._params = params
        # In the backbone's vocabulary; a tokenizer may have tokens that the model gives no score.
        changed = {**params.logit_bias, **dict.fromkeys(params.banned, float("-inf"))}
        changed = {token: bias for token, bias in changed.items() if token < vocab_size}
        self._bias = torch.zeros(vocab_size, dtype=torch.float32)
        self._bias[list(changed)] = torch.tensor(list(changed.values()))
        self._bias = self._bias.to(device)
        self._penalizes = penalizes(params)
        self._num_counted = 0
        if self._penalizes:
            self._seen = torch.zeros(vocab_size, dtype=torch.bool, device=device)
            self._seen[torch.tensor(prompt, dtype=torch.long, device=device)] = True
            self._counts = torch.zeros(vocab_size, dtype=torch.int32, device=device)

    def apply(self, scores: Float[Tensor, " V"], token_ids: Sequence[int], first_new: int) -> Float[Tensor, " V"]:
        """The changed scores.

        Args:
            scores: Of the next token, in float32; may be overwritten.
            token_ids: The text so far.
            first_new: Index of the first generated token in it.
        """
        scores += self._bias
        if self._penalizes:
            for token in token_ids[first_new + self._num_counted :]:
                self._seen[token] = True
                self._counts[token] += 1
                self._num_counted += 1
            scores = penalize(scores, self._params, self._seen, self._counts)
        return scores


@dataclass(eq=False)
class TokenSequence:
    """One text that is being generated.

    Attributes:
        request: The request that it belongs to.
        index: Which of the request's n sequences.
        detokenizer: Its new tokens as text.
        decoder_start_id: The first token of an encoder-decoder's decoder, whose encoder reads the prompt; None: a
            decoder-only model, which continues the prompt.
        forced_bos_id: The first token to generate, whatever the scores; None: there is none.
        slot: The number of its place in the running batch; -1: it waits.
        runs: Where its keys and values are in the pools: its own, and those of an encoder-decoder's source.
        num_computed_tokens: Of `token_ids`: how many have their keys and values there.
        num_unencoded: Prompt tokens that the encoder has still to read.
        token_ids: The input (the prompt, or `decoder_start_id`), then the generated tokens without the end token.
        num_input_ids: Length of that input.
        finish_reason: None: it goes on.
        prompt_tokens: The prompt's tokens with their log-probabilities, as far as they are computed; empty: they are
            not requested.
        prompt_returned: They are in an output.
        grammar: How far it is in the request's grammar; None: there is none.
        rules: What changes the scores of its next token; None: nothing, or it has no token yet.
    """

    request: Request
    index: int
    detokenizer: Detokenizer
    decoder_start_id: int | None = None
    forced_bos_id: int | None = None
    slot: int = -1
    runs: tuple[range, ...] = ()
    num_computed_tokens: int = 0
    num_unencoded: int = field(init=False)
    token_ids: list[int] = field(init=False)
    num_input_ids: int = field(init=False)
    finish_reason: FinishReason | None = None
    prompt_tokens: list[Token] = field(init=False)
    prompt_returned: bool = False
    grammar: GrammarState | None = None
    rules: LogitRules | None = None

    def __post_init__(self) -> None:
        prompt, start = self.request.prompt, self.decoder_start_id
        self.token_ids = list(prompt) if start is None else [start]
        self.num_unencoded = 0 if start is None else len(prompt)
        self.num_input_ids = len(self.token_ids)
        # Nothing precedes the first one.
        self.prompt_tokens = [] if self.request.sampling.prompt_logprobs is None else [Token(prompt[0])]
        seed = self.request.sampling.seed
        # Each sequence of a request draws its own numbers.
        self.random = random.Random(None if seed is None else f"{seed}/{self.index}")

    @property
    def num_new_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - self.num_input_ids

    @property
    def num_uncomputed(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.token_ids) - self.num_computed_tokens

    def take_prompt_tokens(self) -> tuple[Token, ...]:
        """The prompt's tokens with their log-probabilities, once."""
        if self.prompt_returned:
            return ()
        self.prompt_returned = True
        return tuple(self.prompt_tokens)
