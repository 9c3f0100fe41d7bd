"""The artifact: a prefix as one small safetensors file, read and checked without any model.

It holds `SITE.LAYER.key` and `SITE.LAYER.value` tensors of shape (H, P, D), `head.weight` and `head.bias` where a head
was trained, a JSON header under the metadata key `prefixtune`, and a checksum of all of it. `docs/format.md` has the
whole schema.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError, describe_value
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.header import HEADER_KEY, backbone_origin, check_header
from prefixtune.prefix.prefix import Head, KeyValue, Prefix
from prefixtune.prefix.tensor_file import metadata_with_checksum, read_verified, save_file
from prefixtune.utils.files import atomic_path

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_READ = (*DTYPES.values(), torch.float64)
"""Types of a file's tensors; others, such as float8, cannot be computed with."""

_POSITIONS = {
    "decoder": "text starts at position P",
    "encoder-decoder": "text positions are not shifted",
    "encoder": "text positions are not shifted",
}
"""The position convention by kind of model; every artifact records it for each site."""

_NAME = re.compile(r"^(encoder|decoder|cross)\.(\d{1,5})\.(key|value)$")


def read_artifact(path: str | Path) -> Prefix:
    """Read a prefix, checking everything except whether it fits a model.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, not a prefix, of an unknown version, or holds NaN or
            infinity; or its header and its tensors disagree.
    """
    tensors, header = read_verified(
        path, HEADER_KEY, "is a safetensors file, but not a prefix", "give a file that `prefixtune train` wrote."
    )
    check_header(header, repr(str(path)))
    head = _head(tensors, path)
    prefix = Prefix(_layers(tensors, path), header, head)
    for key, fact in describe_tensors(prefix).items():
        if key in header and header[key] != fact:
            what = key.replace("_", " ")
            raise CheckpointError(
                f"the header of {str(path)!r} has {what} {header[key]!r}, but its tensors have {fact!r}.",
                hint="the file was changed, or written by another program; get it again.",
            )
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again, or train it again.")
    return prefix


def describe_tensors(prefix: Prefix) -> dict[str, Any]:
    """What a header says of a prefix's tensors."""
    kind = backbone_origin(prefix.header).kind
    shifts = kind == "decoder" and prefix.sites == ("decoder",)
    return {
        "sites": list(prefix.sites),
        "prefix_length": prefix.lengths,
        "positions": {site: _POSITIONS[kind if shifts and site == "decoder" else "encoder"] for site in prefix.sites},
        "geometry": {
            site: {
                "num_layers": len(shapes),
                "num_kv_heads": [s.num_kv_heads for s in shapes],
                "head_dim": [s.key_dim for s in shapes],
            }
            for site, shapes in prefix.geometry.items()
        },
        "dtype": str(prefix.dtype).removeprefix("torch."),
        **({} if prefix.head is None else {"head": {"num_labels": len(prefix.head.bias)}}),
    }


def _head(tensors: dict[str, Tensor], path: str | Path) -> Head | None:
    """Take the head out of the tensors, where there is one."""
    weight, bias = tensors.pop("head.weight", None), tensors.pop("head.bias", None)
    if weight is None and bias is None:
        return None
    fits = weight is not None and bias is not None and weight.dim() == 2 and bias.shape == weight.shape[:1]
    if not fits or weight is None or bias is None or not {weight.dtype, bias.dtype} <= set(_READ):
        raise CheckpointError(
            f"{str(path)!r} holds an incomplete head, or one of another type.", hint="get the file again."
        )
    return Head(weight, bias)


def _layers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[Site, tuple[KeyValue, ...]]:
    """Tensors by name -> per site the layers in order.

    Raises:
        CheckpointError: A tensor does not belong to a prefix, or some are missing or do not fit together.
    """
    parts: dict[Site, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None or tensor.dtype not in _READ:
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {tensor.dtype}, which does not belong to a prefix.",
                hint="give a file that `prefixtune train` wrote.",
            )
        site, index, part = match.groups()
        parts.setdefault(cast(Site, site), {}).setdefault(int(index), {})[part] = tensor
    layers: dict[Site, tuple[KeyValue, ...]] = {}
    for name, by_index in parts.items():
        if sorted(by_index) != list(range(len(by_index))) or any(len(pair) != 2 for pair in by_index.values()):
            raise CheckpointError(f"{str(path)!r} lacks some layers of site {name!r}.", hint="get the file again.")
        layers[name] = tuple((by_index[n]["key"], by_index[n]["value"]) for n in range(len(by_index)))
    try:
        Prefix(layers)
    except ConfigError as error:
        raise CheckpointError(f"{str(path)!r}: {error.message}", hint="get the file again.") from error
    return layers


def save_prefix(path: str | os.PathLike[str], prefix: Prefix, *, dtype: torch.dtype | str = torch.float32) -> Path:
    """Store a prefix as one file: the tensors and its header.

    Args:
        path: Ends with `.safetensors`.
        prefix: With its header; see `make_header`.
        dtype: Of keys and values: float32, or bfloat16 for half the size; or its name. A head keeps its own.

    Raises:
        CheckpointError: The prefix holds NaN, infinity or numbers too large for the dtype, or the path has another
            ending.
        ConfigError: An argument is something else.
        PrefixError: The file cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(prefix, Prefix):
        raise ConfigError(
            f"path is {describe_value(path)} and prefix {describe_value(prefix)}, but must be a path and a Prefix.",
            hint="write save_prefix(path, prefix).",
        )
    chosen = dtype if isinstance(dtype, torch.dtype) else DTYPES.get(dtype)
    if chosen not in _READ:
        raise ConfigError(f"dtype is {dtype}, which no prefix is stored in.", hint=f"use {', '.join(DTYPES)}.")
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{str(path)!r} does not end with .safetensors.", hint=f"write to {path.stem}.safetensors."
        )
    stored = prefix.detach().to(chosen, "cpu")
    if not stored.is_finite():
        raise CheckpointError(
            f"the prefix for {str(path)!r} holds NaN or infinity in {chosen}.",
            hint="store it as bfloat16 or float32, or train it again.",
        )
    header = {**prefix.header, **describe_tensors(stored)}
    check_header(header, f"the prefix for {str(path)!r}")
    tensors = {
        f"{site}.{index}.{part}": tensor.contiguous()
        for site, layers in stored.layers.items()
        for index, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    if stored.head is not None:
        tensors |= {"head.weight": stored.head.weight.contiguous(), "head.bias": stored.head.bias.contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, metadata_with_checksum(HEADER_KEY, header, tensors))
    return path
