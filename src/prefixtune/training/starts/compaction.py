"""Fewer positions that do the work of many: a text's keys and values, compacted to P positions.

`match` follows Attention Matching ("Fast KV Compaction via Attention Matching", 2026): keys are kept, values are solved
for in closed form so that attention gives what it gave. That method also adds a bias to each kept score, which a plain
prefix cannot hold. So here the values are fitted to the layer's whole attention output, prefix and text together: they
also make up for the weight that the prefix loses against the text behind it when most of its keys go.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from prefixtune.attention.injection import observe_attention
from prefixtune.attention.kernels import ScoreOptions
from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix

_QUERIES = 1024
"""Most tokens of the text that are read again for reference queries."""
_ROW = 256
"""Most tokens of a row of them: bounds the memory of scores."""
_FEWEST = 8
"""Fewest tokens of a row that are worth reading."""
_RIDGE = 1e-3
"""How strongly values are held to those of the text, relative to the mean square of the weights on them."""
_NUMBERS = 2**27
"""Numbers of the equations of the layers that are solved for at a time: 1 GiB."""

Layer = tuple[Site, int]


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


def match(backbone: Backbone, whole: Prefix, ids: Sequence[int], lengths: Mapping[Site, int]) -> Prefix:
    """P positions per site that give nearly the attention output of a whole text, in the text's own keys.

    The reference queries are those of the text's tokens when they are read again behind the whole text: up to 1,024 of
    them, in rows of up to 256, evenly over the text. Each KV head keeps the P positions with the largest root mean
    square weight, by softmax over the text's positions; then its values solve

        min_V  sum_q || a_P(q) V + a_S(q) V_S - attention(q; whole text and S) ||^2,

    where S is what stands behind the prefix, and a(q) are the weights over the kept keys and S together.

    Args:
        backbone: The frozen model.
        whole: The text's keys and values.
        ids: The text's tokens.
        lengths: P by site, each at most the text's length.

    Raises:
        ConfigError: The model leaves no room behind the text, or its attention cannot be observed.
    """
    rows = _rows_to_read(backbone, ids)
    text = {
        (site, index): (key.to(backbone.device), value.to(backbone.device))
        for site in lengths
        for index, (key, value) in enumerate(whole.layers[site])
    }
    weight = {layer: torch.zeros(key.shape[:2], device=key.device) for layer, (key, _) in text.items()}

    def weigh(layer: Layer, scores: Tensor, values: Tensor) -> None:
        weight[layer] += scores[..., : weight[layer].shape[1]].softmax(-1).square().sum(1)

    if _observe(backbone, whole, rows, text, weigh) != set(text):
        raise ConfigError(
            f"compaction 'match' needs to observe attention, which {backbone.name!r} computes by itself.",
            hint="give --compaction stride or cut.",
        )
    made: dict[Layer, KeyValue] = {}
    for group in _groups([(layer, len(text[layer][0]) * lengths[layer[0]] ** 2) for layer in text]):
        fits = {layer: _Fit(_heaviest(weight[layer], lengths[layer[0]]), text[layer][1]) for layer in group}
        _observe(backbone, whole, rows, fits, lambda layer, *seen, fits=fits: fits[layer].add(*seen))
        made |= {layer: (_rows(text[layer][0], fit.kept).cpu(), fit.solve()) for layer, fit in fits.items()}
    return Prefix({site: tuple(made[site, index] for index in range(len(whole.layers[site]))) for site in lengths})


def _groups(sizes: Sequence[tuple[Layer, int]]) -> list[list[Layer]]:
    """Layers whose equations are held at a time: at least one, and not many more than `_NUMBERS` numbers.

    >>> layers = [("decoder", index) for index in range(3)]
    >>> [len(group) for group in _groups([(layer, _NUMBERS // 2) for layer in layers])]
    [2, 1]
    """
    groups: dict[int, list[Layer]] = {}
    before = 0
    for layer, size in sizes:
        groups.setdefault(before // _NUMBERS, []).append(layer)
        before += size
    return list(groups.values())


def _heaviest(weight: Float[Tensor, "H T"], length: int) -> Int[Tensor, "H P"]:
    """The positions of most weight, in order; the first one always, which draws idle attention."""
    weight = weight.clone()
    weight[:, 0] = torch.inf
    return weight.topk(length, dim=-1).indices.sort(dim=-1).values


def _rows(tensor: Float[Tensor, "H T D"], kept: Int[Tensor, "H P"]) -> Float[Tensor, "H P D"]:
    """Each head's rows at its positions."""
    return tensor.gather(1, kept[..., None].expand(-1, -1, tensor.shape[-1]))


class _Fit:
    """The normal equations of one layer's values, summed up over reference queries.

    Args:
        kept: The chosen positions of each KV head.
        values: Of the whole text.
    """

    def __init__(self, kept: Int[Tensor, "H P"], values: Float[Tensor, "H T Dv"]) -> None:
        (heads, length), (self.tokens, size) = kept.shape, values.shape[1:]
        self.kept, self.start = kept, _rows(values, kept)
        # Not every accelerator has float64.
        self.gram = torch.zeros(heads, length, length, dtype=torch.float64)
        self.moment = torch.zeros(heads, length, size, dtype=torch.float64)

    def add(self, scores: Float[Tensor, "H N S"], values: Float[Tensor, "H S Dv"]) -> None:
        """Take in queries: their scores on the text and on what stands behind it."""
        kept = scores.gather(-1, self.kept[:, None].expand(-1, scores.shape[1], -1))
        behind = scores[..., self.tokens :]
        total = torch.logaddexp(kept.logsumexp(-1), behind.logsumexp(-1))[..., None]
        weights = (kept - total).exp()
        given = weights @ self.start + (behind - total).exp() @ values[:, self.tokens :]
        missing = scores.softmax(-1) @ values - given
        self.gram += (weights.mT @ weights).cpu()
        self.moment += (weights.mT @ missing).cpu()

    def solve(self) -> Float[Tensor, "H P Dv"]:
        """The values that fit best, on the CPU: ridge regression, held to the text's own values."""
        size = self.gram.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=1e-30)
        ridge = _RIDGE * size[:, None, None] * torch.eye(self.gram.shape[-1], dtype=size.dtype)
        change: Tensor = torch.linalg.solve(self.gram + ridge, self.moment)
        return self.start.cpu() + change.float()


def _rows_to_read(backbone: Backbone, ids: Sequence[int]) -> list[list[int]]:
    """Pieces of the text to read again behind the whole text.

    Raises:
        ConfigError: The model leaves no room behind the text.
    """
    limit = backbone.max_positions_with(len(ids))
    room = _ROW if limit is None else min(_ROW, limit - backbone.prefix_positions(len(ids)))
    if room < min(_FEWEST, len(ids)):
        raise ConfigError(
            f"the text's {len(ids):,} tokens fill the {limit:,} positions of {backbone.name!r}, "
            "but compaction 'match' reads some of them again behind it.",
            hint="give --compaction stride, or shorten the text.",
        )
    pieces = [list(ids[first : first + room]) for first in range(0, len(ids), room)]
    most = max(1, _QUERIES // room)
    return [pieces[index] for index in evenly_spaced(len(pieces), min(most, len(pieces))).tolist()]


@torch.no_grad()
def _observe(
    backbone: Backbone,
    whole: Prefix,
    rows: Sequence[Sequence[int]],
    layers: Collection[Layer],
    add: Callable[[Layer, Tensor, Tensor], None],
) -> set[Layer]:
    """Read the rows behind the whole text, and give the layers' scores and values to `add`; returns the layers seen."""
    seen: set[Layer] = set()

    def observer(
        layer: Layer,
        length: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        options: ScoreOptions,
        first: int,
    ) -> None:
        if layer in layers:
            seen.add(layer)
            add(layer, *_scores_and_values(query[0], key[0], value[0], mask, options))

    with observe_attention(observer):
        for row in rows:
            inputs = {"input_ids": torch.tensor([row], device=backbone.device)}
            if backbone.kind == "encoder-decoder":
                inputs["decoder_input_ids"] = inputs["input_ids"]
            backbone.hidden_states(**inputs, prefixes=whole)
    return seen


def _scores_and_values(
    query: Float[Tensor, "Hq T Dk"],
    key: Float[Tensor, "H S Dk"],
    value: Float[Tensor, "H S Dv"],
    mask: Tensor | None,
    options: ScoreOptions,
) -> tuple[Float[Tensor, "H N C"], Float[Tensor, "H C Dv"]]:
    """A row's scores in float32, the queries that share a KV head side by side, and its values.

    A sink is one more column, whose value is zero.
    """
    heads, queries, kv_heads = query.shape[0], query.shape[1], key.shape[0]
    grouped = query.float().reshape(kv_heads, -1, query.shape[-1])
    scores = (grouped @ key.float().mT * options.scale).reshape(heads, queries, -1)
    if options.softcap is not None:
        scores = torch.tanh(scores / options.softcap) * options.softcap
    if options.position_bias is not None:
        scores = scores + options.position_bias[0].float()
    if mask is not None:
        scores = scores.masked_fill(~mask[0], -torch.inf) if mask.dtype == torch.bool else scores + mask[0].float()
    value = value.float()
    if options.sinks is not None:
        sinks = options.sinks.float()[:, None, None].expand(-1, queries, 1)
        scores, value = torch.cat([scores, sinks], dim=-1), nn.functional.pad(value, (0, 0, 0, 1))
    return scores.reshape(kv_heads, -1, scores.shape[-1]), value
