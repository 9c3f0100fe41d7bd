"""transformers' caches: one that already holds every row's prefix, and one that forgets nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from prefixtune.attention.injection import batch_prefixes
from prefixtune.attention.layout import Layout, main_device
from prefixtune.prefix.prefix import Prefix

__all__ = ["cache_argument", "can_crop_empty_layers", "growing_cache", "prefilled_cache"]


def cache_argument(model: Any) -> str:
    """The name under which a model's forward takes its cache (transformers 5.24 renamed it)."""
    parameters = inspect.signature(type(model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def prefilled_cache(
    model: Any, layout: Layout, prefixes: Sequence[Prefix | None], *, repeats: int = 1, static_length: int | None = None
) -> tuple[Any, Bool[Tensor, "B P"]]:
    """A cache that already holds every row's prefix, shorter ones padded in front.

    Args:
        model: The frozen model.
        layout: What `probe` found.
        prefixes: One per row; None: that row has no prefix.
        repeats: Rows per text, as beam search needs them.
        static_length: How many positions, the prefix's included, buffers that are written in place have room for;
            None: a cache that grows.

    Returns:
        The cache, and which of its slots are real, one row per text (not repeated).
    """
    from transformers import StaticCache
    from transformers.cache_utils import StaticLayer

    device = main_device(model)
    batch = batch_prefixes(prefixes, layout, model.dtype, device)
    if static_length is None:
        cache = growing_cache(model)
    else:
        cache = StaticCache(config=model.config, max_cache_len=static_length)
        cache.layers = [
            StaticLayer(static_length) if getattr(layer, "is_sliding", False) else layer for layer in cache.layers
        ]
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


@functools.cache
def can_crop_empty_layers() -> bool:
    """Whether transformers can shorten a cache of which some layers were never filled; 5.20 cannot."""
    from transformers.cache_utils import DynamicLayer

    try:
        DynamicLayer().crop(-1)
    except (TypeError, AttributeError):
        return False
    return True
