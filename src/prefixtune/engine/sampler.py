"""Logits -> the next token of each text, by its own sampling parameters: all texts at once.

A seed decides a text: each draws its own random numbers, and what they choose depends on its own scores alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.engine.request import SamplingParams, Token
from prefixtune.engine.sequence import TokenSequence
from prefixtune.errors import PrefixError, RequestError
from prefixtune.sampling.config import LOWEST_TEMPERATURE, SamplingConfig
from prefixtune.sampling.grammar import Grammar

NOT_FINITE = "the model's logits are not finite; the prefix may be broken, or its values too large."
"""Why there is no token."""
_BLOCK = 256
"""Weights of which a sum is drawn before one of them is."""
_ROUNDING = 1e-5
"""Of exponentials in float32, relatively, with a margin."""
_LOGPROBS_BYTES = 2**24
"""Of log-probabilities that are computed at once."""


def sample(logits: Float[Tensor, "W V"], sequences: Sequence[TokenSequence], eos_id: int) -> list[Token | PrefixError]:
    """The next token of every text, or why there is none; the other texts are unaffected.

    Why: a `RequestError` where the request is at fault, as its grammar became too complex.

    Args:
        logits: One row per text.
        sequences: The texts.
        eos_id: The token that ends a text.
    """
    rows = list(enumerate(sequences))
    forced = {row: s.forced_bos_id for row, s in rows if s.forced_bos_id is not None and s.num_new_tokens == 0}
    random = [row for row, s in rows if s.request.sampling.temperature > 0 and row not in forced]
    changed = [row for row, s in rows if _has_rules(s) and row not in forced]
    # A CPU finds maxima of bfloat16 more slowly.
    scores = logits.to(torch.float32, copy=bool(random or changed))
    highest = scores.amax(dim=-1)
    is_finite = highest.isfinite()
    for row in changed:
        _change(scores[row], sequences[row], eos_id)
    grammars = {row: s.grammar for row, s in rows if s.grammar is not None and row not in forced}
    refused: dict[int, RequestError] = {}
    if grammars:
        allowed, refused = Grammar.allowed(grammars, scores.shape[1], scores.device)
        scores[_on([*grammars], scores.device)] = _rows(scores, [*grammars]).masked_fill(~allowed, float("-inf"))
    if changed:
        highest = scores.amax(dim=-1)
    ids = scores.argmax(dim=-1)
    if random:
        below = _rows(scores.sub_(highest[:, None]), random)
        ids[_on(random, ids.device)] = _draw(below, [sequences[row] for row in random])
    chosen, finite, any_left = torch.stack([ids, is_finite.long(), highest.isfinite().long()]).tolist()
    chosen = [forced.get(row, token) for row, token in enumerate(chosen)]
    wanted = {row: s.request.sampling.logprobs for row, s in rows if s.request.sampling.logprobs is not None}
    logprobs: dict[int, tuple[float, tuple[tuple[int, float], ...]]] = {}
    if wanted:
        found = logprobs_of(_rows(logits, [*wanted]), [chosen[row] for row in wanted], max(wanted.values()))
        logprobs = dict(zip(wanted, found, strict=True))
    tokens: list[Token | PrefixError] = []
    for row, token in enumerate(chosen):
        if row in refused:
            tokens.append(refused[row])
        elif finite[row] and any_left[row]:
            logprob, top = logprobs.get(row, (None, ()))
            tokens.append(Token(token, logprob, top[: wanted.get(row)]))
        else:
            tokens.append(PrefixError("every token is banned." if finite[row] else NOT_FINITE))
    return tokens


def _on(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _rows(tensor: Float[Tensor, "B _"], rows: Sequence[int]) -> Float[Tensor, "R _"]:
    """Some rows, in order; not copied if they are all."""
    return tensor if len(rows) == len(tensor) else tensor[_on(rows, tensor.device)]


def _has_rules(sequence: TokenSequence) -> bool:
    """Whether the scores of its next token are changed."""
    params = sequence.request.sampling
    early = sequence.num_new_tokens < params.min_new_tokens
    return bool(early or sequence.grammar or params.banned or params.logit_bias) or penalizes(params)


def _change(scores: Float[Tensor, " V"], sequence: TokenSequence, eos_id: int) -> None:
    """Change the scores of one text by its rules, but for its grammar."""
    params, size, device = sequence.request.sampling, len(scores), scores.device
    if sequence.biases is None:
        added = {**params.logit_bias, **dict.fromkeys(params.banned, float("-inf"))}
        # A tokenizer may have more tokens than its model has scores.
        added = {token: bias for token, bias in added.items() if token < size}
        sequence.biases = _on(list(added), device, torch.long), _on(list(added.values()), device, torch.float32)
    at, biases = sequence.biases
    scores[at] += biases
    if penalizes(params):
        # An encoder-decoder may repeat its source.
        prompt = sequence.request.prompt if sequence.decoder_start_id is None else ()
        counts = _TOKENS.get(sequence) or _TOKENS.setdefault(sequence, TokenCounts(prompt, scores))
        counts.penalize(scores, params, sequence.token_ids[sequence.num_input_ids + counts.num_new :])
    if sequence.num_new_tokens < params.min_new_tokens:
        ends = [token for token in (eos_id, *params.end_ids) if token < size]
        scores.index_fill_(0, _on(ends, device, torch.long), float("-inf"))


def penalizes(params: SamplingConfig) -> bool:
    """Whether the scores depend on the tokens so far."""
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


class TokenCounts:
    """Which tokens a text has, and how often each was generated; kept from step to step, where its scores are.

    Args:
        prompt: The text's beginning, which `repetition_penalty` counts too.
        scores: Of one of its tokens.

    Attributes:
        num_new: Generated tokens that are counted.
    """

    def __init__(self, prompt: Sequence[int], scores: Float[Tensor, " V"]) -> None:
        self.num_new, self._counts = 0, torch.zeros_like(scores)
        self._seen = self._counts.bool().index_fill_(0, _on(prompt, scores.device, torch.long), True)

    def penalize(self, scores: Float[Tensor, " V"], params: SamplingConfig, new: Sequence[int]) -> None:
        """Change the scores of the text's next token, in vLLM's order.

        Args:
            scores: Changed in place.
            params: `repetition_penalty` (Keskar et al., 2019) divides the positive scores of tokens that the text has
                and multiplies the negative ones; OpenAI's `presence_penalty` and `frequency_penalty` are subtracted,
                once for a generated token and as often as it was generated.
            new: Generated tokens that are not counted yet.
        """
        self.num_new, at = self.num_new + len(new), _on(new, scores.device, torch.long)
        self._seen.index_fill_(0, at, True)
        self._counts.index_add_(0, at, torch.ones_like(at, dtype=scores.dtype))
        if (penalty := params.repetition_penalty) != 1:
            scores.copy_(torch.where(self._seen, torch.where(scores > 0, scores / penalty, scores * penalty), scores))
        scores -= params.frequency_penalty * self._counts
        scores -= params.presence_penalty * (self._counts > 0)


_TOKENS: WeakKeyDictionary[TokenSequence, TokenCounts] = WeakKeyDictionary()
"""Of the texts whose scores depend on them."""


def _draw(scores: Float[Tensor, "B V"], sequences: Sequence[TokenSequence]) -> Int[Tensor, " B"]:
    """Sample each text's token within its top_k, top_p and min_p, with its own random numbers.

    Args:
        scores: In float32, the highest of a text 0; overwritten.
        sequences: The texts.
    """
    # Sums of many small weights are computed in float64, which Apple's GPUs lack.
    device = torch.device("cpu") if scores.device.type == "mps" else scores.device
    size, params = scores.shape[1], [s.request.sampling for s in sequences]
    temperatures = _on([max(one.temperature, LOWEST_TEMPERATURE) for one in params], device, torch.float32)
    scaled = scores.to(device).div_(temperatures[:, None])
    limited = [0 < one.top_k < size or one.top_p < 1 or one.min_p > 0 for one in params]
    # A text draws as many numbers as it needs, whatever the others do.
    first = _on([s.random.random() for s in sequences], device, torch.float64)
    drawn = torch.zeros(len(sequences), dtype=torch.long, device=device)
    free = [row for row, is_limited in enumerate(limited) if not is_limited]
    if free:
        at = _on(free, device)
        second = _on([sequences[row].random.random() for row in free], device, torch.float64)
        drawn[at] = _draw_of_all(_rows(scaled, free).exp_(), first[at], second)
    bound = [row for row, is_limited in enumerate(limited) if is_limited]
    if bound:
        at = _on(bound, device)
        drawn[at] = _draw_of_likeliest(_rows(scaled, bound), [params[row] for row in bound], first[at])
    return drawn.to(scores.device)


def _draw_of_all(
    weights: Float[Tensor, "B V"], first: Float[Tensor, " B"], second: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """An index, as often as its share of the weights: first a block of them, then one within it."""
    missing = -weights.shape[1] % _BLOCK
    blocks = (F.pad(weights, (0, missing)) if missing else weights).unflatten(1, (-1, _BLOCK))
    block = _pick(blocks.sum(-1).double(), first)
    within = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + _pick(within.double(), second)


def _draw_of_likeliest(
    scores: Float[Tensor, "B V"], params: Sequence[SamplingParams], drawn: Float[Tensor, " B"]
) -> Int[Tensor, " B"]:
    """An index of those within each text's limits, as often as its share of their weights."""
    size, device = scores.shape[1], scores.device
    top_p, min_p = (_on([[getattr(one, name)] for one in params], device, torch.float64) for name in ("top_p", "min_p"))
    weights = scores.exp()
    totals = weights.sum(-1, keepdim=True).double()
    # All tokens below this together have less than 1 - p, so none of them is among the likeliest that reach p.
    lowest = torch.maximum(totals * (1 - top_p) / size, min_p) * (1 - _ROUNDING)
    possible = (weights > 0) & (weights >= lowest)
    limits = [one.top_k or size for one in params]
    if min(limits) < size:
        top_k = _on([[min(limit, size)] for limit in limits], device)
        most = max(limit for limit in limits if limit < size)
        likeliest = scores.topk(most).values
        kth = likeliest.gather(1, (top_k - 1).clamp(max=most - 1))
        # All that are as likely as the k-th one stay.
        stays = scores >= kth
        possible &= stays | (top_k == size)
        # Of the k first, whatever min_p leaves of them, and of those that are as likely as the k-th one.
        counted = torch.arange(most, device=device) < top_k
        of_k = (likeliest.double().exp() * counted).sum(-1, keepdim=True)
        of_k += (stays.sum(-1, keepdim=True) - top_k) * kth.double().exp()
        totals = torch.where(top_k < size, of_k, totals)
    indices, exist = _indices(possible)
    weights = scores.gather(1, indices).double().exp() * exist
    order = torch.arange(indices.shape[1], device=device).expand_as(indices)
    if any(one.top_p < 1 for one in params):
        order = torch.where(top_p < 1, weights.argsort(dim=-1, descending=True, stable=True), order)
        weights = weights.gather(1, order)
        # The first that reaches p stays.
        weights = weights * ((weights.cumsum(-1) - weights < top_p * totals) | (top_p == 1))
    picked = _pick(weights * (weights >= min_p), drawn)
    return indices.gather(1, order.gather(1, picked[:, None]))[:, 0]


def _indices(possible: Bool[Tensor, "B V"]) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """Where each row is true, in order, and which of these columns exist for it.

    On a GPU, for whose count the host would wait, all columns.
    """
    if possible.device.type != "cpu":
        return torch.arange(possible.shape[1], device=possible.device).expand_as(possible), possible
    counts = possible.sum(-1, keepdim=True)
    columns = possible.nonzero()[:, 1]
    exist = torch.arange(max(1, int(counts.max()))) < counts
    indices = torch.zeros(exist.shape, dtype=torch.long)
    # Both are in the order of rows.
    indices[exist] = columns
    return indices, exist


def _pick(weights: Float[Tensor, "B N"], drawn: Float[Tensor, " B"]) -> Int[Tensor, " B"]:
    """The index at which this share of the weights' sum, in [0, 1), is reached; never one without weight."""
    cumulative = weights.cumsum(-1)
    totals = cumulative[:, -1:].contiguous()
    index = torch.searchsorted(cumulative, totals * drawn[:, None], right=True)
    last = torch.searchsorted(cumulative, totals)
    # Of numbers that are not finite, there is none.
    return torch.minimum(index, last).clamp(max=weights.shape[1] - 1)[:, 0]


def logprobs_of(
    logits: Float[Tensor, "R V"], next_ids: Sequence[int], num_top: int
) -> Iterator[tuple[float, tuple[tuple[int, float], ...]]]:
    """The log-probability of the token that follows each position, and of the likeliest ones there.

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
