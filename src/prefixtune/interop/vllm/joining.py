"""Several prefixes joined to one, as `prefixtune compose` joins files; their headers say how keys turn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.interop.vllm.reference import JOINER
from prefixtune.prefix.compose import check_joinable, join, lead_header, stored_rotation
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.rotation import Rotation

__all__ = ["check_headers", "join_prefixes"]


def join_prefixes(prefixes: Sequence[Prefix], names: Sequence[str]) -> Prefix:
    """The keys and values of prefixes, one after the other; the header is not the joined prefix's.

    Args:
        prefixes: In their order.
        names: Theirs, for messages.

    Raises:
        PrefixError: They cannot be joined; the message says why.
    """
    return join(prefixes, _rotation_of(prefixes, names))


def check_headers(
    headers: Mapping[str, Mapping[str, Any]], lengths: Sequence[int], shapes: Sequence[LayerShape]
) -> Mapping[str, Any]:
    """Whether prefixes can be joined, without reading their numbers.

    Args:
        headers: Each prefix's header, by its name.
        lengths: P of each.
        shapes: The model's layers.

    Returns:
        The header of the joined prefix, without its parts.

    Raises:
        RequestError: They cannot be joined; the message says why.
    """
    prefixes, names = [], list(headers)
    for header, length in zip(headers.values(), lengths, strict=True):
        layers = tuple(
            (
                _no_numbers(shape.num_kv_heads, length, shape.key_dim),
                _no_numbers(shape.num_kv_heads, length, shape.value_dim),
            )
            for shape in shapes
        )
        prefixes.append(Prefix({"decoder": layers}, header))
    try:
        rotation = _rotation_of(prefixes, names)
    except PrefixError as error:
        raise RequestError(f"{JOINER.join(names)!r} cannot be joined: {error.message}", hint=error.hint) from error
    total, most = sum(lengths), rotation.max_positions
    if most is not None and total >= most:
        raise RequestError(
            f"{JOINER.join(names)!r} takes {total:,} positions, but the model has {most:,}, and the text needs some.",
            hint="join fewer.",
        )
    return lead_header(prefixes, len(prefixes) - 1)


def _rotation_of(prefixes: Sequence[Prefix], names: Sequence[str]) -> Rotation:
    """How the model's keys turn with position.

    Raises:
        PrefixError: No header says it, or the prefixes do not belong together.
    """
    check_joinable(prefixes, names)
    rotation = stored_rotation(prefixes, [repr(name) for name in names])
    if rotation is None:
        files = " ".join(f"{name}.safetensors" for name in names)
        raise CheckpointError(
            "no file of them says how the model's keys turn with position (older versions of prefixtune did not store "
            "their `rotation`).",
            hint=f"compose it first: `prefixtune compose {files} --output {'-'.join(names)}.safetensors`.",
        )
    return rotation


def _no_numbers(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")
