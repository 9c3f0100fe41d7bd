"""Which position of a packed row sees which, as a function of two indices: for torch's flex_attention.

All prefixes stand in front of the row's keys, one after the other. Blocks that nobody sees, such as those of other
groups, are not computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from prefixtune.attention.packing import Packing
from prefixtune.prefix.geometry import Site

__all__ = ["add_prefixes", "packed_block_mask", "packed_mask_mod"]

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Bool[Tensor, ""]]
"""Takes batch, head, query and key; returns whether the query sees the key."""
Pair = tuple[Tensor, Tensor]


def add_prefixes(
    prefix_kv_by_group: Sequence[Pair | None], key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...], tuple[int, ...]]:
    """A row's keys and values with all prefixes in front, each once.

    Args:
        prefix_kv_by_group: The prefix in front of each group, (1, H, P, D) keys and values; None: no prefix.
        key: (1, H, S, Dk), of the row.
        value: (1, H, S, Dv), of the row.

    Returns:
        Keys, values, the lengths of the prefixes, and which of them is each group's (-1: none).
    """
    prefixes: dict[int, Pair] = {id(pair): pair for pair in prefix_kv_by_group if pair is not None}
    index = {identity: number for number, identity in enumerate(prefixes)}
    owners = tuple(-1 if pair is None else index[id(pair)] for pair in prefix_kv_by_group)
    keys = torch.cat([*(pair[0].to(key) for pair in prefixes.values()), key], dim=2)
    values = torch.cat([*(pair[1].to(value) for pair in prefixes.values()), value], dim=2)
    return keys, values, tuple(pair[0].shape[2] for pair in prefixes.values()), owners


def packed_block_mask(
    packing: Packing,
    site: Site,
    lengths: tuple[int, ...],
    owners: tuple[int, ...],
    window: int | None,
    device: torch.device,
) -> Any:
    """The block mask of a row, made once for all layers with the same; arguments as for `packed_mask_mod`."""
    from torch.nn.attention.flex_attention import create_block_mask

    key = ("flex", site, lengths, owners, window, device)
    if key not in packing.cache:
        queries, keys = (sum(counts) for counts in packing.sizes(site))
        mask_mod = packed_mask_mod(packing, site, lengths, owners, window, device)
        packing.cache[key] = create_block_mask(mask_mod, None, None, queries, sum(lengths) + keys, device=device)
    return packing.cache[key]


def packed_mask_mod(
    packing: Packing,
    site: Site,
    lengths: Sequence[int],
    owners: Sequence[int],
    window: int | None,
    device: torch.device,
) -> MaskMod:
    """Whether a query of a row sees a key.

    Args:
        packing: The row's groups.
        site: Where.
        lengths: Of the prefixes in front of the row's keys.
        owners: Which of them is each group's; -1: none.
        window: Of the text, only the nearest `window` positions are visible; None: all.
        device: Where queries and keys are.
    """
    own, others = map(_groups, packing.sizes(site))
    total, front = sum(lengths), torch.zeros(sum(lengths)).long()
    # Of each key: its prefix (-1: text), where it is in it, its group (-1: prefix), and where it is in the row.
    prefix = torch.cat([_groups(lengths), torch.full_like(others, -1)])
    in_prefix = torch.cat([*map(torch.arange, lengths), torch.zeros_like(others)])
    group = torch.cat([torch.full((total,), -1), others])
    index = torch.cat([front, torch.arange(len(others))])
    parts, positions = _parts(packing), packing.positions()[0]
    hidden, owner = _hidden(packing, site, lengths, owners), torch.tensor(owners)
    own, prefix, in_prefix, group, hidden, owner = (
        tensor.to(device) for tensor in (own, prefix, in_prefix, group, hidden, owner)
    )
    # Lambdas, since nothing may wrap what torch is to trace.
    if site != "decoder":
        return lambda b, h, q, k: (
            ((prefix[k] >= 0) & (prefix[k] == owner[own[q]]) & ~hidden[own[q], in_prefix[k]]) | (group[k] == own[q])
        )
    # The row's queries and keys are the same positions.
    key_parts, key_positions = torch.cat([front, parts]), torch.cat([front, positions])
    index, parts, positions, key_parts, key_positions = (
        tensor.to(device) for tensor in (index, parts, positions, key_parts, key_positions)
    )
    nearest = len(own) + 1 if window is None else window
    return lambda b, h, q, k: (
        ((prefix[k] >= 0) & (prefix[k] == owner[own[q]]) & ~hidden[own[q], in_prefix[k]])
        | (
            (group[k] == own[q])
            & ((key_parts[k] == 0) | (key_parts[k] == parts[q]))
            & (index[k] <= q)
            & (positions[q] - key_positions[k] < nearest)
        )
    )


def _groups(sizes: Sequence[int]) -> Int[Tensor, " N"]:
    """The group of each position."""
    return torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes).long())


def _parts(packing: Packing) -> Int[Tensor, " N"]:
    """Of each position of the row: 0 in its group's source, else the number of its target, from 1."""
    lengths = [length for group in packing.groups for length in (group.source_length, *group.target_lengths)]
    numbers = [number for group in packing.groups for number in range(1 + len(group.target_lengths))]
    return torch.repeat_interleave(torch.tensor(numbers), torch.tensor(lengths))


def _hidden(packing: Packing, site: Site, lengths: Sequence[int], owners: Sequence[int]) -> Bool[Tensor, "G P"]:
    """Which positions of its prefix each group does not see."""
    hidden = torch.zeros(len(owners), max([1, *lengths]), dtype=torch.bool)
    if packing.hides_at(site):
        for row, group, owner in zip(hidden, packing.groups, owners, strict=True):
            row[[position for position in group.hidden if owner >= 0 and position < lengths[owner]]] = True
    return hidden
