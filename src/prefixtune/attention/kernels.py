"""Kernels."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site

__all__ = ["ScoreOptions", "eager_attention", "grouped_attention"]


_SMALL_GROUP = 512
"""Below this many positions, plain matrix products beat the CPU's fused bf16 kernel (2.7 times at 150 positions)."""


@dataclass(frozen=True, eq=False)
class ScoreOptions:
    """How scores are made beyond the product of queries and keys.

    Attributes:
        scale: Multiplies the scores.
        position_bias: (1, Hq, T, S), added to them; None: nothing.
        softcap: They are squeezed into (-softcap, softcap); None: not.
        sinks: (Hq,), one more score per query that draws weight and gives no value; None: not there.
        spelled_out: Compute it by hand even where a fused function could.
    """

    scale: float
    position_bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    spelled_out: bool = False


def eager_attention(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    special: ScoreOptions,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention spelled out, for what torch's fused function does not compute."""
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = (query @ key.transpose(2, 3)).float() * special.scale
    if special.softcap is not None:
        scores = torch.tanh(scores / special.softcap) * special.softcap
    if special.position_bias is not None:
        scores = scores + special.position_bias
    if mask is not None:
        lowest = torch.finfo(scores.dtype).min
        scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    if special.sinks is not None:
        sinks = special.sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1].to(value.dtype) @ value
    return scores.softmax(-1).to(value.dtype) @ value


def supports_flex(query: Tensor, key: Tensor, value: Tensor, special: ScoreOptions) -> bool:
    """Whether flex_attention computes it: it has no sinks, and on the CPU no gradients."""
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
    return special.sinks is None and not (learning and query.device.type == "cpu")


def call_flex_attention(
    query: Float[Tensor, "B Hq T Dk"],
    key: Float[Tensor, "B H S Dk"],
    value: Float[Tensor, "B H S Dv"],
    mask: Tensor | None,
    special: ScoreOptions,
) -> Float[Tensor, "B Hq T Dv"]:
    """Attention by torch's flex_attention: the same scores as `eager_attention`."""
    shape = (*query.shape[:3], key.shape[2])
    if mask is not None and mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, torch.finfo(query.dtype).min)
    parts = [part for part in (special.position_bias, mask) if part is not None]
    added = sum(parts[1:], parts[0]).expand(shape) if parts else query.new_zeros(()).expand(shape)
    cap = special.softcap
    # Lambdas, since nothing may wrap what torch is to trace.
    if cap is None:
        score = lambda given, row, head, place, seen: given + added[row, head, place, seen]  # noqa: E731
    else:
        score = lambda given, row, head, place, seen: torch.tanh(given / cap) * cap + added[row, head, place, seen]  # noqa: E731
    out: Tensor = _flex(query.device.type)(
        query, key, value, score_mod=score, scale=special.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out


@functools.cache
def _flex(device_type: str) -> Callable[..., Any]:
    """Torch's flex_attention; compiled on accelerators, which is what it is for."""
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cpu":
        compiled: Callable[..., Any] = torch.compile(flex_attention)
        return compiled

    def plain(*args: Any, **kwargs: Any) -> Any:
        with warnings.catch_warnings():
            # That it is not compiled is meant: compiling for a CPU takes minutes and gains nothing.
            warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
            return flex_attention(*args, **kwargs)

    return plain


def packed_attention(
    packing: Packing,
    site: Site,
    fronts: Sequence[tuple[Tensor, Tensor] | None],
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    special: ScoreOptions,
    biases: Sequence[Tensor | None],
) -> Float[Tensor, "1 T Hq Dv"]:
    """Attention of a packed row, group by group, so that nothing is computed across groups."""
    # `split` and `squeeze`, not slices and indices: their backward passes write each gradient once.
    ours, theirs = packing.sizes(site)
    split = query.split(ours, dim=2), key.split(theirs, dim=2), value.split(theirs, dim=2)
    outputs = []
    row, column = 0, 0
    for front, bias, group_query, group_key, group_value in zip(fronts, biases, *split, strict=True):
        length = 0 if front is None else front[0].shape[2]
        queries, keys = group_query.shape[2], group_key.shape[2]
        if front is not None:
            group_key = torch.cat([front[0].to(key), group_key], dim=2)
            group_value = torch.cat([front[1].to(value), group_value], dim=2)
        relative = special.position_bias
        if relative is not None:
            relative = nn.functional.pad(relative[..., row : row + queries, column : column + keys], (length, 0))
        row, column = row + queries, column + keys
        if special.softcap is not None or special.sinks is not None or special.spelled_out:
            part = ScoreOptions(special.scale, relative, special.softcap, special.sinks)
            mask = None if bias is None else bias[None, None]
            outputs.append(eager_attention(group_query, group_key, group_value, mask, part)[0])
        else:
            outputs.append(grouped_attention(group_query, group_key, group_value, bias, relative, special.scale))
    # Some models look at it as one row, which needs it in this order in memory.
    return torch.cat(outputs, dim=1).transpose(0, 1).unsqueeze(0).contiguous()


def grouped_attention(
    query: Float[Tensor, "1 Hq T Dk"],
    key: Float[Tensor, "1 H S Dk"],
    value: Float[Tensor, "1 H S Dv"],
    bias: Float[Tensor, "T S"] | None,
    relative: Float[Tensor, "1 Hq T S"] | None,
    scale: float,
) -> Float[Tensor, "Hq T Dv"]:
    """Attention of one group."""
    heads, queries, kv_heads = query.shape[1], query.shape[2], key.shape[1]
    # Query heads that share a KV head stand side by side as rows, so that keys are never repeated.
    rows = query.reshape(1, kv_heads, -1, query.shape[-1])
    if relative is not None:
        relative = relative.to(query.dtype) if bias is None else relative.to(query.dtype) + bias
        bias = relative.reshape(kv_heads, -1, key.shape[2])
    elif bias is not None:
        bias = bias.repeat(heads // kv_heads, 1)
    small = queries <= _SMALL_GROUP and query.dtype != torch.float32 and query.device.type == "cpu"
    if small:
        # Scores and softmax in float32, as the fused kernel does: rounded scores would blur the gradient.
        wide = rows.squeeze(0).float(), key.squeeze(0).float().transpose(1, 2)
        scores = torch.bmm(*wide) * scale if bias is None else torch.baddbmm(bias.float(), *wide, alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(query.dtype), value.squeeze(0))
    else:
        out = nn.functional.scaled_dot_product_attention(rows, key, value, attn_mask=bias, scale=scale)
    return out.reshape(heads, queries, -1)
