"""What changes the scores of a sequence's next token: a bias, penalties, banned tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.engine.request import SamplingParams
from prefixtune.sampling.penalties import penalize, penalizes

__all__ = ["LogitRules", "has_rules"]


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
        self._params, self._device = params, device
        # In the backbone's vocabulary; a tokenizer may have tokens that the model gives no score.
        banned = [token for token in params.banned if token < vocab_size]
        self._banned = torch.tensor(banned, dtype=torch.long, device=device)
        self._biased = torch.tensor(list(params.logit_bias), dtype=torch.long, device=device)
        self._bias = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32, device=device)
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
        if len(self._biased):
            scores[self._biased] += self._bias
        if self._penalizes:
            for token in token_ids[first_new + self._num_counted :]:
                self._seen[token] = True
                self._counts[token] += 1
                self._num_counted += 1
            scores = penalize(scores, self._params, self._seen, self._counts)
        if len(self._banned):
            scores[self._banned] = float("-inf")
        return scores
