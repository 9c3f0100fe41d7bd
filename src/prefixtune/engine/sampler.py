"""Logits -> the next token of each text, by its own sampling parameters: all texts at once, and one transfer.

A seed decides a text: each draws its own random numbers, and what they choose depends on its own scores alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from prefixtune.engine.request import SamplingParams, Token
from prefixtune.engine.sequence import LogitRules, TokenSequence, has_rules
from prefixtune.errors import RequestError
from prefixtune.sampling.config import LOWEST_TEMPERATURE

__all__ = ["NOT_FINITE", "prompt_logprobs", "sample"]


NOT_FINITE = "the model's logits are not finite; the prefix may be broken, or its values too large."
"""Why there is no token."""
_ALL_BANNED = "every token is banned."
_BLOCK = 256
"""Weights of which a sum is drawn before one of them is."""
_ROUNDING = 1e-5
"""Of exponentials in float32, relatively, with a margin."""
_CACHED_SCORES = 2**18
"""Of texts whose tokens are chosen together on a CPU."""
_LOGPROBS_BYTES = 2**24
"""Of a prompt's log-probabilities that are computed at once."""


def sample(
    logits: Float[Tensor, "W V"], sequences: Sequence[TokenSequence], eos_id: int
) -> list[Token | str | RequestError]:
    """The next token of every text, or why there is none; the other texts are unaffected.

    Why: a sentence, or an error where the request is at fault, as its grammar became too complex.

    Args:
        logits: One row per text.
        sequences: The texts.
        eos_id: The token that ends a text.
    """
    forced = {row for row, s in enumerate(sequences) if s.forced_bos_id is not None and s.num_new_tokens == 0}
    changed = {row for row, s in enumerate(sequences) if _changes_scores(s)} - forced
    random = {row for row, s in enumerate(sequences) if s.request.sampling.temperature > 0} - forced
    allowed = _without_ends(logits, sequences, eos_id)
    has_any = torch.ones(len(sequences), dtype=torch.bool, device=logits.device)
    is_finite, ids = has_any.clone(), torch.zeros_like(has_any, dtype=torch.long)
    refused: dict[int, RequestError] = {}
    # On a CPU, so many at once that their scores stay in its caches.
    count = max(1, _CACHED_SCORES // logits.shape[1] if logits.device.type == "cpu" else len(sequences))
    for start in range(0, len(sequences), count):
        part = range(start, min(start + count, len(sequences)))
        drawn, rules = [row - start for row in part if row in random], changed.intersection(part)
        # A CPU finds maxima of bfloat16 more slowly.
        scores = allowed[part.start : part.stop].to(torch.float32, copy=bool(drawn or rules))
        highest = scores.amax(dim=-1)
        is_finite[part.start : part.stop] = highest.isfinite()
        if rules:
            for row in rules:
                try:
                    scores[row - start] = _change(scores[row - start], sequences[row])
                except RequestError as error:
                    refused[row] = error
            highest = scores.amax(dim=-1)
            has_any[part.start : part.stop] = highest.isfinite()
        if len(drawn) < len(part):
            ids[part.start : part.stop] = scores.argmax(dim=-1)
        if drawn:
            below = _rows(scores.sub_(highest[:, None]), drawn)
            ids[_on([start + place for place in drawn], ids.device)] = _draw(
                below, [sequences[start + place] for place in drawn]
            )
    for row, sequence in enumerate(sequences):
        if row in forced and sequence.forced_bos_id is not None:
            ids[row] = sequence.forced_bos_id
    found = _read(ids, is_finite, has_any, logits, [s.request.sampling for s in sequences])
    return [refused.get(row, token) for row, token in enumerate(found)]


def _on(numbers: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Numbers on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _rows(tensor: Float[Tensor, "B _"], rows: Sequence[int]) -> Float[Tensor, "R _"]:
    """Some rows, in order; not copied if they are all."""
    return tensor if len(rows) == len(tensor) else tensor[_on(rows, tensor.device)]


def _changes_scores(sequence: TokenSequence) -> bool:
    """Whether the scores of its next token are changed."""
    return sequence.grammar is not None or has_rules(sequence.request.sampling)


def _without_ends(
    logits: Float[Tensor, "W V"], sequences: Sequence[TokenSequence], eos_id: int
) -> Float[Tensor, "W V"]:
    """The scores, without those of tokens that would end a text too early."""
    # A tokenizer may have more tokens than its model has scores.
    ends = [
        (row, token)
        for row, s in enumerate(sequences)
        if s.num_new_tokens < s.request.sampling.min_new_tokens
        for token in (eos_id, *s.request.sampling.end_ids)
        if token < logits.shape[1]
    ]
    if not ends:
        return logits
    rows, tokens = zip(*ends, strict=True)
    return logits.index_put((_on(rows, logits.device), _on(tokens, logits.device)), logits.new_full((), float("-inf")))


def _change(scores: Float[Tensor, " V"], sequence: TokenSequence) -> Float[Tensor, " V"]:
    """The scores of one text by its rules and its grammar.

    Raises:
        RequestError: The grammar became too complex.
    """
    params = sequence.request.sampling
    if has_rules(params):
        if sequence.rules is None:
            # An encoder-decoder may repeat its source.
            prompt = sequence.request.prompt if sequence.decoder_start_id is None else ()
            sequence.rules = LogitRules(params, prompt, len(scores), scores.device)
        scores = sequence.rules.apply(scores, sequence.token_ids, sequence.num_input_ids)
    if sequence.grammar is not None:
        allowed = sequence.grammar.allowed(len(scores)).to(scores.device, non_blocking=True)
        scores = scores.masked_fill(~allowed, float("-inf"))
    return scores


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


def _read(
    ids: Int[Tensor, " W"],
    is_finite: Bool[Tensor, " W"],
    has_any: Bool[Tensor, " W"],
    logits: Float[Tensor, "W V"],
    params: Sequence[SamplingParams],
) -> list[Token | str]:
    """All that is wanted of a step, in one transfer."""
    columns = [ids[:, None].int(), is_finite[:, None].int(), has_any[:, None].int()]
    wanted = [row for row, one in enumerate(params) if one.logprobs is not None]
    most = min(max((params[row].logprobs or 0 for row in wanted), default=0), logits.shape[1])
    if wanted:
        at = _on(wanted, logits.device)
        logprobs = logits[at].float().log_softmax(-1)
        top = logprobs.topk(most)
        numbers = torch.cat([logprobs.gather(1, ids[at][:, None]), top.values], dim=1)
        # Floats travel as the integers of their bits.
        extra = torch.zeros(len(params), 1 + 2 * most, dtype=torch.int32, device=logits.device)
        extra[at] = torch.cat([numbers.view(torch.int32), top.indices.int()], dim=1)
        columns.append(extra)
    table = torch.cat(columns, dim=1).cpu()
    floats = table[:, 3:].contiguous().view(torch.float32).tolist()
    tokens: list[Token | str] = []
    for one, floats_of, (token, finite, any_left, *numbers_of) in zip(params, floats, table.tolist(), strict=True):
        if not finite:
            tokens.append(NOT_FINITE)
        elif not any_left:
            tokens.append(_ALL_BANNED)
        elif one.logprobs is None:
            tokens.append(Token(token))
        else:
            top_ids, values = numbers_of[1 + most :], floats_of[1:]
            likeliest = tuple(zip(top_ids[: one.logprobs], values[: one.logprobs], strict=False))
            tokens.append(Token(token, floats_of[0], likeliest))
    return tokens


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
