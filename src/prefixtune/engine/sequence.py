"""One text that is being generated."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from torch import Tensor

from prefixtune.engine.kv_cache import Pages
from prefixtune.engine.request import FinishReason, Request, Token
from prefixtune.sampling.detokenizer import Detokenizer
from prefixtune.sampling.grammar import Grammar


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
        pages: Where its keys and values are in the pools: its own, and those of an encoder-decoder's source.
        num_computed_tokens: Of `token_ids`: how many have their keys and values there.
        num_unencoded: Prompt tokens that the encoder has still to read.
        token_ids: The input (the prompt, or `decoder_start_id`), then the generated tokens without the end token.
        num_input_ids: Length of that input.
        finish_reason: None: it goes on.
        prompt_tokens: The prompt's tokens with their log-probabilities, as far as they are computed; empty: they are
            not requested.
        prompt_returned: They are in an output.
        grammar: How far it is in the request's grammar; None: there is none.
        biases: Token ids, and what is added to their scores; None: it has no token yet.
    """

    request: Request
    index: int
    detokenizer: Detokenizer
    decoder_start_id: int | None = None
    forced_bos_id: int | None = None
    slot: int = -1
    pages: tuple[Pages, ...] = ()
    num_computed_tokens: int = 0
    num_unencoded: int = field(init=False)
    token_ids: list[int] = field(init=False)
    num_input_ids: int = field(init=False)
    finish_reason: FinishReason | None = None
    prompt_tokens: list[Token] = field(init=False)
    prompt_returned: bool = False
    grammar: Grammar | None = None
    biases: tuple[Tensor, Tensor] | None = None

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
