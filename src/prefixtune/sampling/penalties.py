"""Penalties for tokens that a text already has."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefixtune.sampling.config import SamplingConfig

__all__ = ["penalize", "penalizes"]


def penalizes(params: SamplingConfig) -> bool:
    """Whether the scores depend on the tokens so far."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def penalize(
    scores: Float[Tensor, "*B V"], params: SamplingConfig, seen: Bool[Tensor, "*B V"], counts: Int[Tensor, "*B V"]
) -> Float[Tensor, "*B V"]:
    """Scores with all penalties, in vLLM's order.

    Args:
        scores: Of the next token.
        params: `repetition_penalty` (Keskar et al., 2019) divides the positive scores of seen tokens and multiplies the
            negative ones; OpenAI's `presence_penalty` and `frequency_penalty` are subtracted, once for a generated
            token and as often as it was generated.
        seen: Which tokens the prompt or the text has.
        counts: How often each token was generated.
    """
    if params.repetition_penalty != 1:
        penalty = params.repetition_penalty
        scores = torch.where(seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores)
    if params.frequency_penalty:
        scores = scores - params.frequency_penalty * counts
    if params.presence_penalty:
        scores = scores - params.presence_penalty * (counts > 0)
    return scores
