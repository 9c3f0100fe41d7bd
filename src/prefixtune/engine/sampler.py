"""Logits -> the next token of each text, by its own rules.

Knows nothing of models, slots and schedules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.engine.request import Token
from prefixtune.engine.sequence import TokenSequence

__all__ = ["sample"]


_LOWEST_TEMPERATURE = 1e-5
"""Below it, scores would overflow; the likeliest token has all the weight anyway."""


def sample(logits: Float[Tensor, "W V"], sequences: Sequence[TokenSequence], eos_id: int) -> list[Token | str]:
    """The next token of every text, or in words why there is none: one text's trouble is not that of the others.

    Texts without rules of their own are decided together; the others one by one, in float32.

    Args:
        logits: One row a text.
        sequences: The texts.
        eos_id: The token that ends a text.
    """
    early = [row for row, s in enumerate(sequences) if s.num_new < s.request.sampling.min_new_tokens]
    allowed = logits
    if early:
        allowed = logits.clone()
        allowed[early, eos_id] = float("-inf")
    # A row with a NaN anywhere has NaN as its maximum.
    best = allowed.max(dim=-1)
    chosen: list[Token | str] = []
    for row, (sequence, score, token) in enumerate(
        zip(sequences, best.values.tolist(), best.indices.tolist(), strict=True)
    ):
        if not math.isfinite(score):
            chosen.append("the model gave numbers that are not finite; the prefix may be broken, or too large.")
        elif sequence.first is not None and sequence.num_new == 0:
            chosen.append(_told(sequence.first, logits[row], sequence))
        else:
            chosen.append(Token(token) if _plain(sequence) else _choose_one(logits[row], allowed[row], sequence))
    return chosen


def _plain(sequence: TokenSequence) -> bool:
    """Whether the likeliest token is taken as it is."""
    rules = sequence.request.sampling
    return rules.temperature == 0 and rules.logprobs is None and rules.repetition_penalty == 1 and not rules.banned


def _choose_one(logits: Float[Tensor, " V"], allowed: Float[Tensor, " V"], sequence: TokenSequence) -> Token | str:
    rules = sequence.request.sampling
    scores = allowed.float().clone()
    if rules.repetition_penalty != 1 and sequence.own_ids:
        seen = torch.tensor(sorted(set(sequence.own_ids)), device=scores.device)
        given = scores[seen]
        scores[seen] = torch.where(given > 0, given / rules.repetition_penalty, given * rules.repetition_penalty)
    if rules.banned:
        scores[list(rules.banned)] = float("-inf")
    best = scores.max(dim=-1)
    if not math.isfinite(float(best.values)):
        return "no token is left that may be chosen."
    token = int(best.indices)
    if rules.temperature > 0:
        token = _draw((scores - best.values) / max(rules.temperature, _LOWEST_TEMPERATURE), sequence)
    return _told(token, logits, sequence)


def _told(token: int, logits: Float[Tensor, " V"], sequence: TokenSequence) -> Token:
    """A chosen token, with the log-probabilities that were asked for."""
    rules = sequence.request.sampling
    if rules.logprobs is None:
        return Token(token)
    logarithms = logits.float().log_softmax(-1)
    likeliest = logarithms.topk(min(rules.logprobs, len(logarithms)))
    pairs = tuple(zip(likeliest.indices.tolist(), likeliest.values.tolist(), strict=True))
    return Token(token, float(logarithms[token]), pairs)


def _draw(scores: Float[Tensor, " V"], sequence: TokenSequence) -> int:
    """Sample within top_k and top_p, by the text's own random numbers: one a token."""
    rules = sequence.request.sampling
    if 0 < rules.top_k < len(scores):
        lowest = scores.topk(rules.top_k).values[-1]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    probabilities = scores.double().softmax(-1)
    # All tokens below this together have less than 1 - p, so that none is among the likeliest that reach p.
    floor = (1 - rules.top_p) / len(scores)
    places = ((probabilities >= floor) & (probabilities > 0)).nonzero().flatten()
    probabilities = probabilities[places]
    if rules.top_p < 1:
        probabilities, order = probabilities.sort(descending=True, stable=True)
        # The first that reaches p stays.
        count = int((probabilities.cumsum(-1) - probabilities < rules.top_p).sum())
        probabilities, places = probabilities[:count], places[order]
    sums = probabilities.cumsum(-1)
    drawn = int(torch.searchsorted(sums, float(sums[-1]) * sequence.random.random(), right=True))
    return int(places[min(drawn, len(sums) - 1)])
