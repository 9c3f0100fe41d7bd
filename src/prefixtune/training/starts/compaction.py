"""Fewer positions that do the work of many: a text's keys and values, compacted to P positions.

`match` follows Attention Matching ("Fast KV Compaction via Attention Matching", arXiv 2602.16284): keys are chosen.
Then a bias for the score of each, and its value, are solved for in closed form, so that reference queries get what the
whole text gave them. A plain prefix holds no bias: it is put into the keys, along a direction that all queries of a
head have nearly the same product with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.injection import observe_attention
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.backbone.backbone import Backbone
from prefixtune.data.batching import collate, divide
from prefixtune.data.encoding import TokenizedExample
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.compose import join
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix
from prefixtune.prefix.rotation import Rotation

_PIECE = 4096
"""Most tokens of a text that are compacted at once."""
_TEXT, _QUESTIONS = 1024, 2048
"""Most tokens of the text that are read again for reference queries (a quarter where there are questions), and of
questions."""
_ROW, _PASS = 256, 1024
"""Most tokens of a row of the text, and of questions in a pass: bounds the memory of scores."""
_TEXT_WEIGHT = 0.05
"""What the queries of the text weigh together where there are questions, as a share of the questions' number."""
_ANSWER_WEIGHT = 4.0
"""What a query weighs from which a token of an answer is predicted; another query of a question weighs 1."""
_RIDGE = 1e-3
"""How strongly values are held to those of the text, relative to the mean square of the weights on them."""
_BIAS = 3.0
"""Largest bias of a key, up and down."""
_BIAS_STEPS = 200
_DIRECTION_RIDGE = 0.01
_SPREAD = 0.2
"""Largest standard deviation of a bias of 1 over the reference queries; a head with more gets no bias."""
_NUMBERS = 2**20
"""Scores that are computed at a time, which a CPU's caches hold."""

Layer = tuple[Site, int]
_T = TypeVar("_T")


def evenly_spaced(tokens: int, length: int) -> Int[Tensor, " P"]:
    """P positions of T, the first and the last among them.

    >>> evenly_spaced(9, 3), evenly_spaced(9, 1), evenly_spaced(3, 3)
    (tensor([0, 4, 8]), tensor([0]), tensor([0, 1, 2]))
    """
    return torch.linspace(0, tokens - 1, length).round().long()


def take(prefix: Prefix, kept: Mapping[Site, Int[Tensor, " P"]]) -> Prefix:
    """A prefix of some positions of another, the same ones in all layers of a site."""
    return Prefix(
        {site: tuple((k[:, index], v[:, index]) for k, v in prefix.layers[site]) for site, index in kept.items()}
    )


def side_by_side(parts: Sequence[Prefix]) -> Prefix:
    """Prefixes of the same sites, one after the other, at the positions that their keys have."""
    return join(parts, Rotation("none"), shared=False)


def can_move(backbone: Backbone) -> bool:
    """Whether keys can be turned to other positions, and a text behind a prefix is moved on by it: not in encoders."""
    try:
        return backbone.kind == "decoder" and backbone.rotation.positions == "rotary"
    except BackboneError:
        return False


def moved(backbone: Backbone, prefix: Prefix, offset: int) -> tuple[Prefix, int]:
    """A prefix with its keys turned on by some positions (negative: back), and by how many: 0 where they cannot be."""
    if not offset or not can_move(backbone):
        return prefix, 0
    return backbone.rotation.turn(prefix, offset), offset


def piece_length(backbone: Backbone) -> int:
    """Most tokens of a text that are compacted at once: there is room behind them for texts to read."""
    limit = min(backbone.max_positions_with(1) or _PIECE, _PIECE)
    return limit - min(_PASS, limit // 4)


def match(
    backbone: Backbone,
    whole: Prefix,
    ids: Sequence[int],
    lengths: Mapping[Site, int],
    questions: Sequence[TokenizedExample] = (),
) -> tuple[Prefix, dict[str, Any]]:
    """P positions per site that give nearly the attention output of a whole text, in the text's own keys.

    Reference queries are those of questions about the text with their answers, each read behind the whole text, and of
    the text's own tokens, read again. Each KV head keeps the P positions with the largest root mean square weight, by
    softmax over the text's positions. With questions, each kept key gets a bias b, so that the kept keys draw as much
    weight as the whole text does:

        min_w  sum_q ( sum_j w_j exp(q k_j) / sum_i exp(q k_i) - 1 )^2,   b = log w,   k_j' = k_j + b_j u,

    where i counts through the text, and u is the direction of least variance that the queries have a mean product of 1
    with: u = S^-1 m / (m' S^-1 m), of their mean m and covariance S. Then the values solve

        min_V  sum_q || a_P(q) V + a_S(q) V_S - attention(q; whole text and S) ||^2,

    where S is what stands behind the prefix, and a(q) are the weights over the kept keys and S together.

    Args:
        backbone: The frozen model.
        whole: The text's keys and values.
        ids: The text's tokens.
        lengths: P by site, each at most the text's length.
        questions: With their answers; those that find no room behind the text are left out.

    Returns:
        The prefix; and what a header says of the questions: how many were read, how many heads have a bias, and the
        number of positions behind the text that it was fitted on.

    Raises:
        ConfigError: The model's attention cannot be observed.
    """
    room = (backbone.max_positions_with(len(ids)) or 2 * _PIECE) - backbone.prefix_positions(len(ids))
    asked = [question for question in questions if _size(question) <= room and backbone.kind == "decoder"]
    asked = _spread_out(asked, len(asked) * _QUESTIONS // max(sum(map(_size, asked)), _QUESTIONS))
    part = 4 if asked else 1
    row = min(_ROW // part, room)
    rows = [list(ids[first : first + row]) for first in range(0, len(ids), row)]
    seen = _observe(backbone, whole, _spread_out(rows, _TEXT // part // row), asked)
    if any((site, index) not in seen for site in lengths for index in range(len(whole.layers[site]))):
        raise ConfigError(
            f"compaction 'match' needs to observe attention, which {backbone.name!r} computes by itself.",
            hint="give --compaction stride or cut.",
        )
    made: dict[Site, list[KeyValue]] = {site: [] for site in lengths}
    biased: list[bool] = []
    for site, length in lengths.items():
        for index, (key, value) in enumerate(whole.layers[site]):
            *pair, spread = seen.pop((site, index)).compact(key, value, length, biases=bool(asked))
            made[site].append((pair[0], pair[1]))
            biased += (spread <= _SPREAD).tolist()
    facts = {"heads": sum(biased), "of": len(biased), "positions": max(map(_size, asked), default=0)}
    prefix = Prefix({site: tuple(layers) for site, layers in made.items()})
    return prefix, {"questions": len(asked), "bias": facts} if asked else {}


class _Queries:
    """The reference queries of a layer, and what attention gives them from behind the text.

    What a text and what stands behind it give together follows from the two apart: the logarithm of the sum of the
    exponentials of their scores (their mass), and the output, of each.

    Attributes:
        parts: Per text: the scaled queries (H, N, Dk), those that share a KV head side by side; the mass (H, N) and the
            output (H, N, Dv) of what stands behind; and how much each query counts, (1, N).
        softcap: Of the scores.
    """

    def __init__(self, options: ScoreOptions) -> None:
        self.softcap = options.softcap
        self.parts: list[tuple[Tensor, ...]] = []

    def add(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: ScoreOptions, weight: Tensor
    ) -> None:
        """Take in the queries of a text (Hq, T, Dk), with the keys and values behind the prefix, (H, S, D)."""
        heads, size, value = len(key), key.shape[1], value.float()
        grouped = (query.float() * options.scale).reshape(heads, -1, query.shape[-1])
        scores = self.scores(grouped, key).reshape(*query.shape[:2], size)
        if options.position_bias is not None:
            scores = scores + options.position_bias[0, ..., -size:].float()
        if mask is not None:
            mask = mask[0, ..., -size:]
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
        if options.sinks is not None:
            # One more column, whose value is zero.
            sinks = options.sinks.float()[:, None, None].expand(-1, query.shape[1], 1)
            scores, value = torch.cat([scores, sinks], dim=-1), nn.functional.pad(value, (0, 0, 0, 1))
        shares, mass = _softmax(scores.reshape(heads, -1, scores.shape[-1]))
        self.parts.append((grouped, mass, shares @ value, weight.to(mass).repeat(len(query) // heads)[None]))

    def scores(self, query: Float[Tensor, "H N Dk"], key: Float[Tensor, "H S Dk"]) -> Float[Tensor, "H N S"]:
        """The scores of keys."""
        scores = query @ key.float().mT
        return scores if self.softcap is None else torch.tanh(scores / self.softcap) * self.softcap

    def compact(
        self, key: Float[Tensor, "H T Dk"], value: Float[Tensor, "H T Dv"], length: int, *, biases: bool
    ) -> tuple[Float[Tensor, "H P Dk"], Float[Tensor, "H P Dv"], Float[Tensor, " H"]]:
        """P keys and values in place of T, and each head's spread of a bias of 1; infinite without biases."""
        query, behind, output, weight = (torch.cat(some, 1) for some in zip(*self.parts, strict=True))
        key, value, weight = key.to(query), value.to(query), weight[0, :, None]
        drawn, masses, outputs = torch.zeros_like(key[..., 0]), [], []
        size = max(1, _NUMBERS // drawn.numel())
        for some, counts in zip(query.split(size, 1), weight.split(size), strict=True):
            shares, mass = _softmax(self.scores(some, key))
            masses.append(mass)
            outputs.append(shares @ value)
            drawn += (shares.square_() * counts).sum(1)
        mass = torch.cat(masses, 1)
        share = torch.sigmoid(mass - behind)[..., None]
        wanted = share * torch.cat(outputs, 1) + (1 - share) * output
        # The first position is always kept: it draws idle attention.
        drawn[:, 0] = torch.inf
        kept = drawn.topk(length).indices.sort().values[..., None]
        key, value = key.take_along_dim(kept, 1), value.take_along_dim(kept, 1)
        spread = torch.full((len(key),), torch.inf)
        if biases:
            bias = _biases((self.scores(query, key) - mass[..., None]).exp(), weight)
            direction, spread = _direction(query, weight)
            bias[spread > _SPREAD] = 0
            key = key + (bias[..., None] * direction[:, None]).to(key)
        shares, mass = _softmax(self.scores(query, key))
        share = torch.sigmoid(mass - behind)[..., None]
        shares *= share
        missing = wanted - shares @ value - (1 - share) * output
        weighted = shares * weight
        change = _solve(_products(weighted, shares), _products(weighted, missing), _RIDGE)
        return key.cpu(), value.cpu() + change.float(), spread


def _softmax(scores: Float[Tensor, "H N S"]) -> tuple[Float[Tensor, "H N S"], Float[Tensor, "H N"]]:
    """The softmax of scores, and the logarithm of the sum of their exponentials."""
    shares = scores.softmax(-1)
    # The largest share belongs to the largest score.
    return shares, scores.amax(-1) - shares.amax(-1).log()


def _products(left: Float[Tensor, "H N A"], right: Float[Tensor, "H N B"]) -> Float[Tensor, "H A B"]:
    """The products of the columns, in float64 on the CPU: not every accelerator has it."""
    return (left.mT @ right).cpu().double()


def _solve(gram: Float[Tensor, "H A A"], moment: Float[Tensor, "H A B"], ridge: float) -> Float[Tensor, "H A B"]:
    """Ridge regression; the ridge is relative to the mean of the diagonal."""
    size = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
    solved: Tensor = torch.linalg.solve(gram + torch.diag_embed(size[:, None].expand(gram.shape[:-1])), moment)
    return solved


def _biases(shares: Float[Tensor, "H N P"], weight: Float[Tensor, "N 1"]) -> Float[Tensor, "H P"]:
    """Biases for which the shares of the text's mass that kept keys have add up to 1: least squares, within bounds.

    By accelerated projected gradients (Beck & Teboulle 2009).
    """
    gram, moment = _products(shares * weight, shares), (shares * weight).sum(1).cpu().double()
    rate = 1 / torch.linalg.eigvalsh(gram)[:, -1:].clamp(min=1e-30)
    factor = ahead = torch.ones_like(moment)
    pace = 1.0
    for _ in range(_BIAS_STEPS):
        before, factor = factor, ahead - rate * ((gram @ ahead[..., None])[..., 0] - moment)
        factor = factor.clamp(math.exp(-_BIAS), math.exp(_BIAS))
        faster = (1 + math.sqrt(1 + 4 * pace * pace)) / 2
        ahead, pace = factor + (pace - 1) / faster * (factor - before), faster
    return factor.log()


def _direction(query: Float[Tensor, "H N Dk"], weight: Float[Tensor, "N 1"]) -> tuple[Tensor, Tensor]:
    """The direction (H, Dk) of least variance of a mean product of 1 with the queries, and its deviation (H,)."""
    share = weight / weight.sum()
    mean = (query * share).sum(1, keepdim=True)
    covariance = _products((query - mean) * share, query - mean)
    column = mean.mT.cpu().double()
    direction = _solve(covariance, column, _DIRECTION_RIDGE)
    direction = direction / (column.mT @ direction)
    return direction[..., 0], (direction.mT @ covariance @ direction)[:, 0, 0].sqrt()


# --- reading ---------------------------------------------------------------------------------------------------------


def _size(question: TokenizedExample) -> int:
    """Tokens of a question with its answers."""
    return len(question.prompt) + sum(map(len, question.targets))


def _spread_out(items: Sequence[_T], most: int) -> list[_T]:
    """At most so many of some items, at least one, evenly spaced."""
    return [items[index] for index in evenly_spaced(len(items), min(max(most, 1), len(items))).tolist()]


@torch.no_grad()
def _observe(
    backbone: Backbone, whole: Prefix, rows: Sequence[Sequence[int]], questions: Sequence[TokenizedExample]
) -> dict[Layer, _Queries]:
    """Read the questions, and rows of the text again, behind the whole text; by layer, the queries that were seen."""
    seen: dict[Layer, _Queries] = {}
    weight = torch.ones(0)

    def observer(layer: Layer, length: int, query: Tensor, key: Tensor, value: Tensor, *more: Any) -> None:
        mask, options, first = more
        own = seen.setdefault(layer, _Queries(options))
        counts = weight[first : first + query.shape[2]]
        own.add(query[0], key[0, :, length:], value[0, :, length:], mask, options, counts)

    asked = sum(map(_size, questions))
    with observe_attention(observer):
        # Rows that cannot be packed are read one by one.
        for some in divide(backbone, questions, _PASS if backbone.layout.packable else 1) if questions else []:
            batch = collate(backbone, some)
            weight = torch.ones(batch.width)
            weight[batch.label_positions] = _ANSWER_WEIGHT
            backbone.hidden_states(**batch.inputs(backbone.device), prefixes=whole)
        for row in rows:
            weight = torch.full((len(row),), _TEXT_WEIGHT * asked / sum(map(len, rows)) if questions else 1.0)
            inputs = {"input_ids": torch.tensor([row], device=backbone.device)}
            if backbone.kind == "encoder-decoder":
                inputs["decoder_input_ids"] = inputs["input_ids"]
            backbone.hidden_states(**inputs, prefixes=whole)
    return seen
