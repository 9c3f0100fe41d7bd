"""What a model computes, recorded while it runs: keys and values, relative position biases, attention to the prefix."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from prefixtune.attention.forward import forward_with_prefixes, takes_logits_to_keep
from prefixtune.attention.injection import trace_calls
from prefixtune.attention.kernels import ScoreOptions, attention_weights
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

_MOST_WEIGHTS = 2**23
"""Attention weights that are held at a time: 32 MB in float32."""


@torch.no_grad()
def prefix_from_tokens(model: Any, layout: Layout, input_ids: Int[Tensor, "1 T"], *, first_position: int = 0) -> Prefix:
    """The keys and values that the model computes for a text, as its attention sees them: a prefix of T positions.

    An encoder-decoder reads the text on both sides; the site `cross` is what its decoder sees of the encoded text.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        input_ids: The text.
        first_position: The position of its first token; other than 0 in a decoder-only model only.
    """
    inputs = {"input_ids": input_ids}
    if first_position:
        inputs["position_ids"] = torch.arange(input_ids.shape[1], device=input_ids.device)[None] + first_position
    if layout.kind == "encoder-decoder":
        inputs["decoder_input_ids"] = input_ids
    return compute_kv(model, layout, **inputs).to(device="cpu")


def add_noise(prefix: Prefix, generator: torch.Generator) -> Prefix:
    """A prefix of a text on the CPU, moved a little at random, as training moves it, to where no text has one."""

    def noisy(tensor: Tensor) -> Tensor:
        return tensor + 0.25 * tensor.square().mean().sqrt() * torch.randn(tensor.shape, generator=generator)

    return Prefix({site: tuple((noisy(k), noisy(v)) for k, v in layers) for site, layers in prefix.layers.items()})


def compute_kv(model: Any, layout: Layout, **inputs: Tensor) -> Prefix:
    """The keys and values that the model computes for its inputs (one row), differentiable in them, in float32."""
    kv = record_kv(model, layout, **inputs)
    return Prefix(
        {
            site: tuple((kv[site, n][0][0].float(), kv[site, n][1][0].float()) for n in range(len(shapes)))
            for site, shapes in layout.geometry.items()
        }
    )


def record_kv(model: Any, layout: Layout, **inputs: Tensor) -> dict[tuple[Site, int], tuple[Tensor, Tensor]]:
    """Every layer's own keys, (B, H, T, D), and values, (B, H, T, Dv); of one that is repeated, the first time."""
    call: dict[str, Any] = dict(inputs)
    if layout.kind != "encoder":
        call["use_cache"] = False
    if takes_logits_to_keep(model):
        # A long text has more logits than keys and values.
        call["logits_to_keep"] = 1
    with trace_calls(model) as calls:
        model(**call)
    kv: dict[tuple[Site, int], tuple[Tensor, Tensor]] = {}
    for made in calls:
        if made.module in layout.layer_of:
            kv.setdefault(layout.layer_of[made.module], (made.key, made.value))
    return kv


@torch.no_grad()
def relative_bias(model: Any, layout: Layout, length: int) -> dict[int, Float[Tensor, "Hq N"]]:
    """What an encoder-decoder's decoder adds to scores at each distance, from 0 on: by layer, where it adds anything.

    Seen by running a row of `length` tokens. Beyond `relative_attention_max_distance`, where the model's configuration
    names one, all distances are alike, so that the row need be no longer.
    """
    farthest = getattr(model.config, "relative_attention_max_distance", None)
    count = length if farthest is None else min(length, farthest + 1)
    biases: dict[int, Float[Tensor, "Hq N"]] = {}
    # A row of one token shows whether there is any bias; in models without one, positions may be few.
    for tokens in (1, count):
        ids = torch.zeros(1, tokens, dtype=torch.long, device=main_device(model))
        with trace_calls(model) as calls:
            forward_with_prefixes(model, layout, ids[:, :1], decoder_input_ids=ids)
        for call in calls:
            site, index = layout.layer_of.get(call.module, ("", 0))
            bias = call.arguments.get("position_bias")
            if site == "decoder" and bias is not None:
                # As the last token sees them.
                biases[index] = bias[0, :, -1].flip(-1)
        if not biases:
            break
    return biases


class PrefixMass:
    """Sums, over queries, of the attention weights at each position of one prefix, by attention layer and head.

    The weights are computed a second time, in float32, beside the attention itself, and a few queries at a time. One
    prefix for all rows, packed or padded.

    Attributes:
        counted: Site -> which queries of the model's next call count, (rows, positions); a site that is missing is not
            looked at.
    """

    def __init__(self, counted: Mapping[Site, Bool[Tensor, "B T"]]) -> None:
        self.counted = counted
        self._sums: dict[tuple[Site, int], Float[Tensor, "Hq P"]] = {}
        self._counts: dict[tuple[Site, int], int] = {}

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
        if site not in self.counted or not length:
            return
        counted = self.counted[site][:, first : first + query.shape[2]].to(query.device)
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
