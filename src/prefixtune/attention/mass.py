"""How much attention goes to the prefix: the softmax's share at each of its positions, summed while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from prefixtune.attention.kernels import ScoreOptions, attention_weights
from prefixtune.prefix.geometry import Site

__all__ = ["PrefixMass"]


_MOST_WEIGHTS = 2**23
"""Attention weights that are held at a time: 32 MB in float32."""


class PrefixMass:
    """Sums, over queries, of the attention weights at each position of one prefix, by attention layer and head.

    The weights are computed a second time, in float32, beside the attention itself, and a few queries at a time. One
    prefix for all rows, packed or padded.

    Args:
        counted: Site -> which queries of the call count, (rows, positions); a site that is missing is not looked at.
    """

    def __init__(self, counted: Mapping[Site, Bool[Tensor, "B T"]]) -> None:
        self._counted = dict(counted)
        self._sums: dict[tuple[Site, int], Float[Tensor, "Hq P"]] = {}
        self._counts: dict[tuple[Site, int], int] = {}

    def count(self, counted: Mapping[Site, Bool[Tensor, "B T"]]) -> None:
        """Count these queries from now on: those of the next call of the model."""
        self._counted = dict(counted)

    @torch.no_grad()
    def add(
        self,
        layer: tuple[Site, int],
        length: int,
        query: Float[Tensor, "B Hq T Dk"],
        key: Float[Tensor, "B H S Dk"],
        value: Float[Tensor, "B H S Dv"],
        mask: Tensor | None,
        scores: ScoreOptions,
        first: int,
    ) -> None:
        """Add the weights of one call of an attention layer: an observer for `observe_attention`.

        Args:
            layer: Which one.
            length: P, of the prefix in front of the keys.
            query: The queries.
            key: All keys, the prefix's first.
            value: All values, which do not matter.
            mask: As `attention_weights` takes it.
            scores: How scores are made.
            first: Where in the row the first query is.
        """
        site, _ = layer
        if site not in self._counted or not length:
            return
        counted = self._counted[site][:, first : first + query.shape[2]].to(query.device)
        columns = counted.any(0).nonzero()[:, 0]
        step = max(1, _MOST_WEIGHTS // (query.shape[0] * query.shape[1] * key.shape[2]))
        for chosen in columns.split(step):
            part = mask if mask is None or mask.shape[-2] == 1 else mask.index_select(-2, chosen)
            bias = scores.position_bias
            options = replace(scores, position_bias=None if bias is None else bias.index_select(2, chosen))
            weights = attention_weights(query.index_select(2, chosen).float(), key.float(), part, options)
            mine = weights[..., :length] * counted[:, None, chosen, None]
            total = mine.sum((0, 2)).cpu()
            self._sums[layer] = self._sums[layer] + total if layer in self._sums else total
            self._counts[layer] = self._counts.get(layer, 0) + int(counted[:, chosen].sum())

    def mean(self) -> dict[Site, list[Float[Tensor, "Hq P"]]]:
        """Each position's share of a query's attention, the mean over the queries counted, by layer; between 0 and 1.

        Layers that share keys and values count as one. A site at which nothing was seen is missing.
        """
        means: dict[Site, list[Tensor]] = {}
        for layer in sorted(self._sums):
            means.setdefault(layer[0], []).append(self._sums[layer] / max(1, self._counts[layer]))
        return means
