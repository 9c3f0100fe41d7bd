"""transformers' caches: one that already holds every row's prefix, and one that forgets nothing."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prefixtune.attention.injection import batch_prefixes
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.prefix import Prefix

__all__ = ["cache_argument", "growing_cache", "prefilled_cache"]


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache (transformers 5.24 renamed it)."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def prefilled_cache(
    model: Any, layout: Layout, prefixes: Sequence[Prefix | None], *, repeats: int = 1
) -> tuple[Any, Bool[Tensor, "B P"]]:
    """A cache that already holds every row's prefix, shorter ones padded in front.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        prefixes: One per row; None: that row has no prefix.
        repeats: Rows per text, as beam search needs them.

    Returns:
        The cache, and which of its slots are real, one row per text (not repeated).
    """
    device = main_device(model)
    batch = batch_prefixes(prefixes, layout, model.dtype, device)
    cache = growing_cache(model)
    rows = len(prefixes)
    pairs = batch.layers.get("decoder", ())
    for index, (key, value) in zip(layout.cache_layers or (), pairs, strict=bool(pairs)):
        cache.update(
            key.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            value.expand(rows, -1, -1, -1).repeat_interleave(repeats, dim=0),
            index,
        )
    longest = pairs[0][0].shape[2] if pairs else 0
    prefix_mask = batch.prefix_mask.get("decoder")
    if prefix_mask is None:
        prefix_mask = torch.ones(rows, longest, dtype=torch.bool, device=device)
    return cache, prefix_mask


def growing_cache(model: Any) -> Any:
    """An empty cache that forgets nothing; the mask applies the window.

    A windowed layer's own cache would forget the prefix, and cannot be shortened.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    cache = DynamicCache(config=model.config)
    cache.layers = [DynamicLayer() if getattr(layer, "is_sliding", False) else layer for layer in cache.layers]
    return cache
