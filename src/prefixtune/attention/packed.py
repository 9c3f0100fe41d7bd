"""Attention of a packed row: in one call on an accelerator that torch compiles for, group by group elsewhere.

On a CPU, groups are faster.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from prefixtune.attention.kernels import (
    ScoreOptions,
    eager_attention,
    flex_attention,
    flex_functions_on,
    grouped_attention,
)
from prefixtune.attention.packing import Packing, Visibility, sees
from prefixtune.prefix.geometry import Site

_SMALL_HEAD = 16
"""Numbers of a head's key or value, below which torch compiles no flex_attention."""


def packed_attention(
    packing: Packing,
    site: Site,
    prefixes: Sequence[tuple[Tensor, Tensor] | None],
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
        prefixes: Those that `packing.owners` counts through, (1, H, P, D) keys and values; None: no prefix.
        query: Of the whole row, as are keys and values.
        key: See there.
        value: See there.
        scores: How scores are made; a position bias is that of the whole row, and zero at the prefix.
        observe: Called for each group, as an `AttentionObserver` that knows the layer.
    """
    lengths = [0 if pair is None else pair[0].shape[2] for pair in prefixes]
    given = [tensor for pair in prefixes if pair is not None for tensor in pair]
    if observe is None and uses_flex(scores, query, key, value, *given):
        # Each prefix once; blocks that nobody sees are left out.
        key = torch.cat([*(tensor.to(key) for tensor in given[::2]), key], dim=2)
        value = torch.cat([*(tensor.to(value) for tensor in given[1::2]), value], dim=2)
        blocks = block_mask(packing, site, lengths, scores.window, query.device)
        if scores.position_bias is not None:
            scores = replace(scores, position_bias=nn.functional.pad(scores.position_bias, (sum(lengths), 0)))
        return flex_attention(query, key, value, blocks, scores).transpose(1, 2).contiguous()
    repeats = query.shape[1] // key.shape[1] if scores.fused and observe is None else 1
    masks = packing.masks(site, lengths, scores.window, query, repeats)
    # `split` and `squeeze`, not slices and indices: their backward passes write each gradient once.
    num_queries, num_keys = packing.sizes(site)
    split = query.split(num_queries, dim=2), key.split(num_keys, dim=2), value.split(num_keys, dim=2)
    outputs = []
    row, column = 0, 0
    for owner, mask, group_query, group_key, group_value in zip(packing.owners, masks, *split, strict=True):
        queries, keys, prefix = group_query.shape[2], group_key.shape[2], prefixes[owner]
        if prefix is not None:
            # Cast for each group, so that the groups' gradients add up in float32.
            group_key = torch.cat([prefix[0].to(key), group_key], dim=2)
            group_value = torch.cat([prefix[1].to(value), group_value], dim=2)
        bias = scores.position_bias
        if bias is not None:
            bias = nn.functional.pad(bias[..., row : row + queries, column : column + keys], (lengths[owner], 0))
        wide = None if mask is None else mask[None, None]
        if observe is not None:
            options = replace(scores, position_bias=bias)
            observe(lengths[owner], group_query, group_key, group_value, wide, options, row)
        if scores.fused:
            out = grouped_attention(group_query, group_key, group_value, mask, bias, scores.scale)
        else:
            out = eager_attention(group_query, group_key, group_value, wide, replace(scores, position_bias=bias))[0]
        outputs.append(out.transpose(0, 1))
        row, column = row + queries, column + keys
    # Some models view the output as one row, so it must be contiguous in this order.
    return torch.cat(outputs).unsqueeze(0).contiguous()


def uses_flex(scores: ScoreOptions, *inputs: Tensor) -> bool:
    """Whether flex_attention computes a packed row: it has no sinks and no small heads, and on a CPU no gradients."""
    if scores.kernel == "eager" or scores.sinks is not None or min(tensor.shape[-1] for tensor in inputs) < _SMALL_HEAD:
        return False
    if inputs[0].device.type == "cuda" and not compiles_on(inputs[0].device):
        return False
    learning = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
    return inputs[0].device.type not in ("cpu", "mps") or (scores.kernel == "flex" and not learning)


@functools.cache
def compiles_on(device: torch.device) -> bool:
    """Whether torch compiles for a GPU: with Triton, which takes Volta and later ones, and calls a C compiler."""
    compiler = any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang")))
    triton = importlib.util.find_spec("triton") is not None
    return compiler and triton and torch.cuda.get_device_capability(device) >= (7, 0)


def block_mask(
    packing: Packing, site: Site, prefix_lengths: Sequence[int], window: int | None, device: torch.device
) -> Any:
    """What flex_attention goes by: made once for all layers with the same; arguments as for `Packing.visibility`."""
    name = ("blocks", site, tuple(prefix_lengths), window, device)
    if name not in packing.cache:
        queries, keys, hidden = packing.visibility(site, prefix_lengths, window)
        here = Visibility(_to(queries, device), _to(keys, device), None if hidden is None else _to(hidden, device))
        create, sizes = flex_functions_on(device.type)[1], (queries.shape[1], keys.shape[1])
        # A lambda, since nothing may wrap what torch is to trace.
        packing.cache[name] = create(lambda b, h, q, k: sees(here, q, k), None, None, *sizes, device=device)
    return packing.cache[name]


def _to(facts: Tensor, device: torch.device) -> Tensor:
    return facts.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else facts.to(device)
