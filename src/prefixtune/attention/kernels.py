"""What computes attention, once keys, values and mask are complete."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.masks import causal_mask
from prefixtune.attention.packed_flex import add_prefixes, packed_block_mask
from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site

__all__ = [
    "AttentionKernel",
    "ScoreOptions",
    "attention_weights",
    "eager_attention",
    "grouped_attention",
    "packed_attention",
    "plain_attention",
]


AttentionKernel = Literal["sdpa", "eager", "flex"]
"""Torch's fused functions (flash among them where the mask allows), matrix products, or torch's flex_attention."""


_SMALL_GROUP = 512
"""Below this many positions, plain matrix products beat the CPU's fused bf16 kernel (2.7 times at 150 positions)."""


# Not frozen: one is made in every layer, and a frozen one takes three times as long.
@dataclass(eq=False)
class ScoreOptions:
    """How one call makes its scores, beyond the product of queries and keys.

    Attributes:
        scale: Multiplies the scores.
        position_bias: (1, Hq, T, S), added to them; None: nothing.
        softcap: They are squeezed into (-softcap, softcap); None: not.
        sinks: (Hq,), one more score per query that draws weight and gives no value; None: no sinks.
        kernel: What is to compute the attention; one that cannot do so leaves it to `eager`.
        window: Only the nearest `window` text positions are visible; None: all.
        causal: Without a mask, a position does not see what follows it.
        arguments: The call's other arguments, as transformers' attention functions take them.
    """

    scale: float
    position_bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    kernel: AttentionKernel = "sdpa"
    window: int | None = None
    causal: bool = True
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_call(
        cls,
        module: nn.Module,
        query: Float[Tensor, "B Hq T Dk"],
        position_bias: Tensor | None,
        softcap: float | None,
        s_aux: Tensor | None,
        kernel: AttentionKernel,
        arguments: Mapping[str, Any],
    ) -> ScoreOptions:
        """What a layer's call of the attention function asks of the scores."""
        causal = arguments.get("is_causal")
        return cls(
            arguments.get("scaling") or query.shape[-1] ** -0.5,
            position_bias,
            softcap,
            s_aux,
            kernel,
            _window(module, arguments),
            getattr(module, "is_causal", True) if causal is None else causal,
            arguments,
        )

    @property
    def fused(self) -> bool:
        """Whether torch's fused function computes it."""
        return self.kernel == "sdpa" and self.softcap is None and self.sinks is None


def _window(module: nn.Module, arguments: Mapping[str, Any]) -> int | None:
    """How many of the nearest positions a layer sees; None: all.

    Some models have it in their mask alone, in whose place packed rows and the engine put their own.
    """
    if "sliding_window" in arguments:
        window: int | None = arguments["sliding_window"]
        return window
    named = module.config if type(module).__name__ == "PhimoeAttention" else module
    return getattr(named, "sliding_window", None) or None


def plain_attention(
    module: nn.Module,
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    scores: ScoreOptions,
) -> Float[Tensor, "B T Hq Dv"]:
    """Attention of an ordinary batch. Without a mask, causal attention sees no later position."""
    if scores.fused:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        bias = scores.position_bias
        fused: Tensor
        fused, _ = sdpa_attention_forward(module, query, key, value, mask, position_bias=bias, **scores.arguments)
        return fused
    if mask is None and scores.causal and query.shape[2] > 1:
        mask = causal_mask(query)
    flex = scores.kernel == "flex" and supports_flex(scores, query, key, value)
    out = (call_flex_attention if flex else eager_attention)(query, key, value, mask, scores)
    return out.transpose(1, 2).contiguous()


def eager_attention(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    scores: ScoreOptions,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention by matrix products, for what torch's fused function does not compute."""
    value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
    return attention_weights(query, key, mask, scores).to(value.dtype) @ value


def attention_weights(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    mask: Tensor | None,
    scores: ScoreOptions,
) -> Float[Tensor, "B Hq T S"]:
    """The softmax of the scores, in float32; sinks take their share of it, so that rows may sum to less than 1."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    weights = (query @ key.transpose(2, 3)).float() * scores.scale
    if scores.softcap is not None:
        weights = torch.tanh(weights / scores.softcap) * scores.softcap
    if scores.position_bias is not None:
        weights = weights + scores.position_bias
    if mask is not None:
        lowest = torch.finfo(weights.dtype).min
        weights = weights.masked_fill(~mask, lowest) if mask.dtype == torch.bool else weights + mask
    if scores.sinks is not None:
        sinks = scores.sinks.float()[None, :, None, None].expand(*weights.shape[:3], 1)
        return torch.cat([weights, sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.softmax(-1)


def supports_flex(scores: ScoreOptions, *inputs: Tensor) -> bool:
    """Whether flex_attention computes it: it has no sinks, and on the CPU no gradients."""
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return scores.sinks is None and not (learning and inputs[0].device.type == "cpu")


def call_flex_attention(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    scores: ScoreOptions,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention by torch's flex_attention: the same scores as `eager_attention`."""
    shape = (*query.shape[:3], key.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    parts = [part for part in (scores.position_bias, mask) if part is not None]
    score_mod = _score_mod(scores.softcap, sum(parts[1:], parts[0]).expand(shape) if parts else None)
    out: Tensor = flex_attention_on(query.device.type)(
        query, key, value, score_mod=score_mod, scale=scores.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


def packed_flex_attention(
    packing: Packing,
    site: Site,
    prefix_kv_by_group: Sequence[tuple[Tensor, Tensor] | None],
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    scores: ScoreOptions,
) -> Float[Tensor, "1 T Hq Dv"]:
    """`packed_attention` by torch's flex_attention, in one call, with the prefixes' keys and values in it once."""
    key, value, lengths, owners = add_prefixes(prefix_kv_by_group, key, value)
    block_mask = packed_block_mask(packing, site, lengths, owners, scores.window, query.device)
    bias = scores.position_bias
    score_mod = _score_mod(scores.softcap, None if bias is None else nn.functional.pad(bias, (sum(lengths), 0)))
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = flex_attention_on(query.device.type)(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scores.scale, enable_gqa=grouped
    )
    return out.transpose(1, 2).contiguous()


def _score_mod(cap: float | None, added: Tensor | None) -> Callable[..., Tensor] | None:
    """What flex_attention does to scores: a soft cap, then something to add."""
    # Lambdas, since nothing may wrap what torch is to trace.
    if cap is None:
        return None if added is None else lambda score, b, h, q, k: score + added[b, h, q, k]
    if added is None:
        return lambda score, b, h, q, k: torch.tanh(score / cap) * cap
    return lambda score, b, h, q, k: torch.tanh(score / cap) * cap + added[b, h, q, k]


@functools.cache
def flex_attention_on(device_type: str) -> Callable[..., Any]:
    """Torch's flex_attention; compiled on accelerators, which is what it is for."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cpu":
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return compiled

    def uncompiled(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # It is not compiled on purpose: compiling for a CPU takes minutes and gains nothing.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*args, **kwargs)

    return uncompiled


def packed_attention(
    packing: Packing,
    site: Site,
    prefix_kv_by_group: Sequence[tuple[Tensor, Tensor] | None],
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    scores: ScoreOptions,
    observe: Callable[..., None] | None = None,
) -> Float[Tensor, "1 T Hq Dv"]:
    """Attention of a packed row; nothing is computed across groups.

    Args:
        packing: The row's groups.
        site: Where.
        prefix_kv_by_group: The prefix in front of each group, (1, H, P, D) keys and values; None: no prefix.
        query: Of the whole row, as are keys and values.
        key: See there.
        value: See there.
        scores: How scores are made; a position bias is that of the whole row, and zero at the prefix.
        observe: Called for each group, as an `AttentionObserver` that knows the layer.
    """
    prefixes = (tensor for pair in prefix_kv_by_group if pair is not None for tensor in pair)
    if scores.kernel == "flex" and observe is None and supports_flex(scores, query, key, value, *prefixes):
        return packed_flex_attention(packing, site, prefix_kv_by_group, query, key, value, scores)
    lengths = [0 if kv is None else kv[0].shape[2] for kv in prefix_kv_by_group]
    masks = packing.masks(site, lengths, scores.window, query.dtype, query.device)
    # `split` and `squeeze`, not slices and indices: their backward passes write each gradient once.
    num_queries, num_keys = packing.sizes(site)
    split = query.split(num_queries, dim=2), key.split(num_keys, dim=2), value.split(num_keys, dim=2)
    outputs = []
    row, column = 0, 0
    for prefix_kv, length, mask, group_query, group_key, group_value in zip(
        prefix_kv_by_group, lengths, masks, *split, strict=True
    ):
        queries, keys = group_query.shape[2], group_key.shape[2]
        if prefix_kv is not None:
            group_key = torch.cat([prefix_kv[0].to(key), group_key], dim=2)
            group_value = torch.cat([prefix_kv[1].to(value), group_value], dim=2)
        bias = scores.position_bias
        if bias is not None:
            bias = nn.functional.pad(bias[..., row : row + queries, column : column + keys], (length, 0))
        if observe is not None:
            wide = None if mask is None else mask[None, None]
            observe(length, group_query, group_key, group_value, wide, replace(scores, position_bias=bias), row)
        row, column = row + queries, column + keys
        if scores.fused:
            outputs.append(grouped_attention(group_query, group_key, group_value, mask, bias, scores.scale))
        else:
            wide = None if mask is None else mask[None, None]
            options = replace(scores, position_bias=bias)
            outputs.append(eager_attention(group_query, group_key, group_value, wide, options)[0])
    # Some models view the output as one row, so it must be contiguous in this order.
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0).contiguous()


def grouped_attention(
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    mask: Float[Tensor, "T S"] | None,
    position_bias: Float[Tensor, "1 Hq T S"] | None,
    scale: float,
) -> Float[Tensor, "Hq T Dv"]:
    """Attention of one group; both the mask and the position bias are added to the scores."""
    heads, queries, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    # Query heads that share a KV head are rows of one product, so that keys are never repeated: (1, H, Hq/H * T, Dk).
    rows = query.reshape(1, kv_heads, -1, query.shape[-1])
    if position_bias is not None:
        bias = position_bias.to(query.dtype) if mask is None else position_bias.to(query.dtype) + mask
        added: Tensor | None = bias.reshape(kv_heads, -1, key.shape[2])
    else:
        added = None if mask is None else mask.repeat(heads // kv_heads, 1)
    small = queries <= _SMALL_GROUP and query.dtype != torch.float32 and query.device.type == "cpu"
    if small:
        # Scores and softmax in float32, as the fused kernel does: rounded scores would blur the gradient.
        wide = rows.squeeze(0).float(), key.squeeze(0).float().transpose(1, 2)
        scores = torch.bmm(*wide) * scale if added is None else torch.baddbmm(added.float(), *wide, alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(query.dtype), value.squeeze(0))
    else:
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=added, scale=scale)
    return out.reshape(heads, queries, -1)
