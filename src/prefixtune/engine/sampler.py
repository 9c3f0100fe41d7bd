"""Logits -> the next token of each sequence, by its own sampling parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from prefixtune.engine.logit_rules import LogitRules, has_rules
from prefixtune.engine.request import SamplingParams, Token
from prefixtune.engine.sequence import TokenSequence
from prefixtune.errors import RequestError
from prefixtune.sampling.config import LOWEST_TEMPERATURE

__all__ = ["NOT_FINITE", "prompt_logprobs", "sample"]


NOT_FINITE = "the model's logits are not finite; the prefix may be broken, or its values too large."
"""Why there is no token."""
_BLOCK = 256
"""Weights of which a sum is drawn before one of them is."""
_ROUNDING = 1e-5
"""Of exponentials in float32, relatively, with a margin."""
_LOGPROBS_BYTES = 2**24
"""Of a prompt's log-probabilities that are computed at once."""


def sample(
    logits: Float[Tensor, "W V"], sequences: Sequence[TokenSequence], eos_id: int
) -> list[Token | str | RequestError]:
    """The next token of every sequence, or why there is none; the other sequences are unaffected.

    Why: a sentence, or an error where the request is at fault, as its grammar became too complex. Plain greedy
    sequences are decided together; the others one by one, in float32.

    Args:
        logits: One row per sequence.
        sequences: The sequences.
        eos_id: The token that ends a text.
    """
    too_short = [row for row, s in enumerate(sequences) if s.num_new_tokens < s.request.sampling.min_new_tokens]
    allowed = logits
    if too_short:
        allowed = logits.clone()
        allowed[too_short, eos_id] = float("-inf")
        for row in too_short:
            # A tokenizer may have more tokens than its model has scores.
            ends = [token for token in sequences[row].request.sampling.end_ids if 0 <= token < logits.shape[1]]
            allowed[row, ends] = float("-inf")
    tokens: list[Token | str | RequestError] = []
    best = allowed.max(dim=-1)
    rows = zip(sequences, best.values.tolist(), best.indices.tolist(), strict=True)
    for row, (sequence, score, token) in enumerate(rows):
        params = sequence.request.sampling
        if not math.isfinite(score):
            tokens.append(NOT_FINITE)
        elif sequence.forced_bos_id is not None and sequence.num_new_tokens == 0:
            tokens.append(_with_logprobs(sequence.forced_bos_id, logits[row], params))
        elif sequence.grammar is None and _is_plain_greedy(params):
            tokens.append(Token(token))
        else:
            try:
                tokens.append(_sample_one(logits[row], allowed[row], sequence))
            except RequestError as error:
                tokens.append(error)
    return tokens


def _is_plain_greedy(params: SamplingParams) -> bool:
    """Whether the likeliest token is all that is needed."""
    return params.temperature == 0 and params.logprobs is None and not has_rules(params)


def _sample_one(logits: Float[Tensor, " V"], allowed: Float[Tensor, " V"], sequence: TokenSequence) -> Token | str:
    params = sequence.request.sampling
    scores = allowed.float().clone()
    if has_rules(params):
        scores = _rules(sequence, scores).apply(scores, sequence.token_ids, sequence.num_input_ids)
    if sequence.grammar is not None:
        scores.masked_fill_(~sequence.grammar.allowed(len(scores)).to(scores.device), float("-inf"))
    best = scores.max(dim=-1)
    if not math.isfinite(float(best.values)):
        return "every token is banned."
    token = int(best.indices)
    if params.temperature > 0:
        scaled = (scores - best.values) / max(params.temperature, LOWEST_TEMPERATURE)
        # Sums of many small weights are computed in float64, which Apple's GPUs lack.
        token = _draw(scaled.cpu() if scaled.device.type == "mps" else scaled, sequence)
    return _with_logprobs(token, logits, params)


def _rules(sequence: TokenSequence, scores: Float[Tensor, " V"]) -> LogitRules:
    """A sequence's rules; made for its first token."""
    if sequence.rules is None:
        # An encoder-decoder may repeat its source.
        prompt = sequence.request.prompt if sequence.decoder_start_id is None else ()
        sequence.rules = LogitRules(sequence.request.sampling, prompt, len(scores), scores.device)
    return sequence.rules


def prompt_logprobs(
    logits: Float[Tensor, "R V"], next_ids: Sequence[int], num_top: int
) -> Iterator[tuple[float, tuple[tuple[int, float], ...]]]:
    """The log-probability of the token after each position of a prompt, and the likeliest tokens there.

    In float32, a few positions at a time: a copy of all logits would take much memory.

    Args:
        logits: After each position.
        next_ids: The tokens that follow.
        num_top: How many of the likeliest.
    """
    rows = max(1, _LOGPROBS_BYTES // (4 * logits.shape[-1]))
    for start in range(0, len(logits), rows):
        logprobs = logits[start : start + rows].float().log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(next_ids[start : start + rows], device=logits.device)[:, None])[:, 0]
        top = logprobs.topk(min(num_top, logprobs.shape[-1]))
        for logprob, ids, values in zip(chosen.tolist(), top.indices.tolist(), top.values.tolist(), strict=True):
            yield logprob, tuple(zip(ids, values, strict=True))


def _with_logprobs(token: int, logits: Float[Tensor, " V"], params: SamplingParams) -> Token:
    """A token with the requested log-probabilities."""
    if params.logprobs is None:
        return Token(token)
    logprobs = logits.float().log_softmax(-1)
    top = logprobs.topk(min(params.logprobs, len(logprobs)))
    top_logprobs = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
    return Token(token, float(logprobs[token]), top_logprobs)


def _draw(scores: Float[Tensor, " V"], sequence: TokenSequence) -> int:
    """Sample within top_k, top_p and min_p, with one of the sequence's own random numbers.

    Args:
        scores: In float32, the highest of them 0; may be overwritten.
        sequence: The sequence.
    """
    params = sequence.request.sampling
    if not 0 < params.top_k < len(scores) and params.top_p == 1 and params.min_p == 0:
        return _pick_of_many(scores.exp_(), sequence)
    if 0 < params.top_k < len(scores):
        candidates = (scores >= scores.topk(params.top_k).values[-1]).nonzero().flatten()
        weights = scores[candidates].double().exp()
        total = weights.sum()
    else:
        rough = scores.exp()
        total = rough.sum(dtype=torch.float64)
        # All tokens below this together have less than 1 - p, so none of them is among the likeliest that reach p.
        floor = float(total) * (1 - params.top_p) / len(scores)
        candidates = ((rough >= floor * (1 - _ROUNDING)) & (rough > 0)).nonzero().flatten()
        weights = scores[candidates].double().exp()
    if params.top_p < 1:
        weights, order = weights.sort(descending=True, stable=True)
        # The first that reaches p stays.
        count = int((weights.cumsum(-1) - weights < params.top_p * total).sum())
        weights, candidates = weights[:count], candidates[order[:count]]
    if params.min_p > 0:
        likely = weights >= params.min_p * weights.max()
        weights, candidates = weights[likely], candidates[likely]
    return int(candidates[_pick(weights, sequence.random.random())])


def _pick_of_many(weights: Float[Tensor, " V"], sequence: TokenSequence) -> int:
    """An index, as often as its share of the weights: first a block of them, then one within it."""
    blocks = F.pad(weights, (0, -len(weights) % _BLOCK)).view(-1, _BLOCK)
    block = _pick(blocks.sum(-1, dtype=torch.float64), sequence.random.random())
    return block * _BLOCK + _pick(blocks[block].double(), sequence.random.random())


def _pick(weights: Float[Tensor, " N"], drawn: float) -> int:
    """The index at which this share of the weights' sum, in [0, 1), is reached; never one without weight."""
    cumulative = weights.cumsum(-1)
    index = torch.searchsorted(cumulative, float(cumulative[-1]) * drawn, right=True)
    return min(int(index), int(torch.searchsorted(cumulative, float(cumulative[-1]))))
