"""What computes attention, once keys, values and mask are complete."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, no_type_check

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.masks import causal_mask

AttentionKernel = Literal["sdpa", "eager", "flex"]
"""Torch's fused functions (flash among them where the mask allows), and flex_attention for packed rows on accelerators;
matrix products; or flex_attention for packed rows everywhere."""


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

    @property
    def fused(self) -> bool:
        """Whether torch's fused function computes it."""
        return self.kernel != "eager" and self.softcap is None and self.sinks is None


def plain_attention(
    module: nn.Module,
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    scores: ScoreOptions,
) -> Float[Tensor, "B T Hq Dv"]:
    """Attention of an ordinary batch. Without a mask, causal attention sees no later position.

    The last query then sees the last key: what is in front of the T last keys is visible to all.
    """
    if mask is None and scores.causal and key.shape[2] > query.shape[2] > 1:
        return causal_attention(query, key, value, scores.scale).transpose(1, 2).contiguous()
    if scores.fused:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        bias = scores.position_bias
        fused: Tensor
        fused, _ = sdpa_attention_forward(module, query, key, value, mask, position_bias=bias, **scores.arguments)
        return fused
    mask = causal_mask(query, key) if mask is None and scores.causal else mask
    return eager_attention(query, key, value, mask, scores).transpose(1, 2).contiguous()


def causal_attention(
    query: Float[Tensor, "B Hq T Dk"], key: Float[Tensor, "B H S Dk"], value: Float[Tensor, "B H S Dv"], scale: float
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention of the last T of S positions, each to itself and to all before it, without a mask on a GPU."""
    # Loads torch's compiler, which takes a second.
    from torch.nn.attention.bias import causal_lower_right

    bias = causal_lower_right(query.shape[2], key.shape[2])
    grouped = query.shape[1] != key.shape[1]
    if grouped:
        from torch.backends.cuda import SDPAParams, can_use_flash_attention

        # Only flash takes groups; without it, torch would compute all scores (float32, GPUs before Ampere).
        grouped = can_use_flash_attention(SDPAParams(query, key, value, None, 0.0, False, True))
        if not grouped:
            repeats = query.shape[1] // key.shape[1]
            key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    return nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale, enable_gqa=grouped)


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
    query: Float[Tensor, "B Hq T Dk"], key: Float[Tensor, "B H S Dk"], mask: Tensor | None, scores: ScoreOptions
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


def flex_attention(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    block_mask: Any,
    scores: ScoreOptions,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention by torch's flex_attention, to what a block mask shows: the same scores as `eager_attention`."""
    attend, _ = flex_functions_on(query.device.type)
    score_mod = _score_mod(scores.softcap, scores.position_bias)
    grouped = query.shape[1] != key.shape[1]
    out: Tensor = attend(
        query, key, value, score_mod=score_mod, block_mask=block_mask, scale=scores.scale, enable_gqa=grouped
    )
    return out


def _score_mod(cap: float | None, added: Tensor | None) -> Callable[..., Tensor] | None:
    """What flex_attention does to scores: a soft cap, then something to add."""

    @no_type_check  # torch traces it
    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        capped = score if cap is None else torch.tanh(score / cap) * cap
        return capped if added is None else capped + added[b, h, q, k]

    return None if cap is None and added is None else score_mod


@functools.cache
def flex_functions_on(device_type: str) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Torch's flex_attention and create_block_mask; compiled on accelerators, once for rows of any length."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    if device_type != "cpu":
        return torch.compile(flex_attention, dynamic=True), torch.compile(create_block_mask, dynamic=True)
    # It is not compiled on purpose: compiling for a CPU takes minutes and gains nothing.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    return flex_attention, create_block_mask


def grouped_attention(
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    mask: Float[Tensor, "_T S"] | None,
    position_bias: Float[Tensor, "1 Hq T S"] | None,
    scale: float,
) -> Float[Tensor, "Hq T Dv"]:
    """Attention of one group; both the mask and the position bias are added to the scores.

    The mask is that of T queries, or of those of all query heads of a KV head, one head after the other.
    """
    heads, queries, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    # Query heads that share a KV head are rows of one product, so that keys are never repeated: (1, H, Hq/H * T, Dk).
    rows = query.reshape(1, kv_heads, -1, query.shape[-1])
    added = mask if mask is None or mask.shape[0] == rows.shape[2] else mask.repeat(heads // kv_heads, 1)
    if position_bias is not None:
        bias = position_bias.to(query.dtype).reshape(kv_heads, -1, key.shape[2])
        added = bias if added is None else bias + added
    small = queries <= _SMALL_GROUP and query.dtype != torch.float32 and query.device.type == "cpu"
    if small:
        # Scores and softmax in float32, as the fused kernel does: rounded scores would blur the gradient.
        wide = rows.squeeze(0).float(), key.squeeze(0).float().transpose(1, 2)
        scores = torch.bmm(*wide) * scale if added is None else torch.baddbmm(added.float(), *wide, alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(query.dtype), value.squeeze(0))
    else:
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=added, scale=scale)
    return out.reshape(heads, queries, -1)
