"""Attention masks that leave the prefix visible: for transformers' registry, and in front of a call's own mask."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prefixtune.attention.layout import setting


def make_mask(*args: Any, **kwargs: Any) -> Any:
    """The mask of scaled-dot-product attention."""
    from transformers.masking_utils import sdpa_mask

    if setting(kwargs.get("config"), "num_kv_shared_layers"):
        # Of such a model only the last queries may reach a layer, which without a mask count as the first ones.
        kwargs["allow_is_causal_skip"] = False
    return sdpa_mask(*args, **kwargs)


def make_additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Any:
    """`make_mask` to be added to scores: 0 where visible, very low elsewhere; None only where everything is visible."""
    mask = make_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    if mask is None:
        return None
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def causal_mask(query: Tensor, key: Tensor) -> Bool[Tensor, "1 1 T S"]:
    """Each of T positions, which are the last of S, sees itself and what is before it."""
    queries, keys = query.shape[2], key.shape[2]
    return query.new_ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


def extend_mask(
    mask: Tensor | None, prefix_mask: Bool[Tensor, "B P"] | None, prefix_length: int, key: Tensor, queries: int
) -> Tensor | None:
    """Prepend P columns to an attention mask: every token sees the whole prefix of its row, whatever the padding.

    Args:
        mask: (B or 1, 1 or H, T, S), True or 0 where visible, False or -inf elsewhere; None: everything is visible.
        prefix_mask: Which prefix slots of a row are real; None: all.
        prefix_length: P.
        key: The keys with the prefix in front, for shape and device.
        queries: T.
    """
    if mask is None:
        if prefix_mask is None:
            return None
        mask = key.new_ones(1, 1, queries, key.shape[2] - prefix_length, dtype=torch.bool)
    if prefix_mask is None:
        columns = mask.new_ones(1, 1, 1, prefix_length, dtype=torch.bool)
    else:
        columns = prefix_mask[:, None, None].to(key.device)
    if mask.dtype != torch.bool:
        columns = torch.zeros_like(columns, dtype=mask.dtype).masked_fill_(~columns, torch.finfo(mask.dtype).min)
    batch = max(mask.shape[0], columns.shape[0])
    columns = columns.expand(batch, mask.shape[1], mask.shape[2], -1)
    return torch.cat([columns, mask.expand(batch, -1, -1, -1)], dim=-1)


def positions_from_mask(mask: Tensor) -> Int[Tensor, "B T"]:
    """Each token's position in its row, counted from the row's first real token; 0 at padding in front of it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
