"""The artifact: a prefix as one small safetensors file, read and checked without any model.

It holds `SITE.LAYER.key` and `SITE.LAYER.value` tensors of shape (H, P, D), `head.weight` and `head.bias` where a head
was trained, and a JSON header under the metadata key `prefixtune`. All that reads it needs is torch and safetensors, so
that engines with libraries of their own can. Knows nothing of backbones but the shapes that it is told.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError
from prefixtune.fingerprints import fingerprints_match
from prefixtune.prefix import Geometry, Head, KeyValue, Prefix

__all__ = [
    "FORMAT_VERSION",
    "HEADER_KEY",
    "Outline",
    "describe_tensors",
    "read_artifact",
    "read_file",
    "read_json",
    "read_outline",
    "reasons_against",
]

FORMAT_VERSION = 1

_POSITIONS = {
    "decoder": "text starts at position P",
    "encoder-decoder": "text positions are not shifted",
    "encoder": "text positions are not shifted",
    "infix": "the source starts at position 0, the target P behind it",
}
"""The position convention by kind of model, recorded in every artifact for each site."""

HEADER_KEY = "prefixtune"
"""Where the header stands among the file's metadata."""

_NAME = re.compile(r"^(encoder|decoder|cross)\.(\d{1,5})\.(key|value)$")
_TENSOR = re.compile(r"(encoder|decoder|cross)\.\d{1,5}\.(key|value)|head\.(weight|bias)")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES = 2**18
"""Longest header that an outline is read from: an ordinary one has a few thousand bytes."""


@dataclass(frozen=True)
class Outline:
    """What a file says of itself, without its tensors.

    Attributes:
        header: The artifact's own.
        shapes: Of every tensor.
    """

    header: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_elements(self) -> int:
        """Numbers in all tensors."""
        return sum(map(math.prod, self.shapes.values()))


def read_outline(path: Path) -> Outline:
    """Read and check a file's header alone.

    Plain reading, no mapping into memory: a file that is cut short meanwhile must not end the process.

    Raises:
        CheckpointError: It is no whole prefix.
        OSError: It cannot be read.
    """
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_BYTES, size - 8):
            raise _broken(f"its header would take {length} bytes")
        text = handle.read(length)
    try:
        tensors = json.loads(text)
        header = json.loads(tensors.pop("__metadata__")[HEADER_KEY], parse_constant=_no_number)
        shapes = {name: tuple(map(_whole, fact["shape"])) for name, fact in tensors.items()}
        told = sum(math.prod(shapes[name]) * _ITEM_BYTES[fact["dtype"]] for name, fact in tensors.items())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _broken("its header is not that of a prefix") from error
    if not isinstance(header, dict):
        raise _broken("its header is no JSON object")
    if told != size - 8 - length:
        raise _broken(f"its header tells of {told} bytes, but {size - 8 - length} follow")
    return Outline(header, shapes)


def reasons_against(outline: Outline, geometry: Geometry, name: str, fingerprint: str | None = None) -> list[str]:
    """Why a prefix cannot be served in front of a model's text; empty: nothing is known against it.

    Args:
        outline: Of its file.
        geometry: The model's.
        name: The model's, for messages.
        fingerprint: The model's; None: other weights are not told apart.
    """
    header, shapes, reasons = outline.header, outline.shapes, []
    if "head.weight" in shapes or header.get("labels"):
        reasons.append("it classifies, and writes no text")
    if header.get("adapter"):
        reasons.append("it was trained together with a LoRA adapter")
    if header.get("placement", "front") != "front":
        reasons.append(f"it stands as {header['placement']!r}, and not in front of the text")
    if any(not _TENSOR.fullmatch(tensor) for tensor in shapes):
        reasons.append("it holds tensors that are no part of a prefix")
    elif not reasons and not _fits(shapes, geometry):
        reasons.append(f"its shapes are not those of {name!r}")
    elif not reasons and fingerprint is not None:
        origin = header.get("backbone")
        told = origin.get("fingerprint", fingerprint) if isinstance(origin, dict) else fingerprint
        if not fingerprints_match(str(told), fingerprint):
            reasons.append(f"it was trained for other weights than those of {name!r}")
    return reasons


def _fits(shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> bool:
    expected = {}
    for site in {name.partition(".")[0] for name in shapes} & geometry.keys():
        for number, shape in enumerate(geometry[site]):
            for part, size in (("key", shape.key_dim), ("value", shape.value_dim)):
                expected[f"{site}.{number}.{part}"] = (shape.num_kv_heads, size)
    return (
        bool(shapes)
        and shapes.keys() == expected.keys()
        and all(len(given) == 3 and (given[0], given[2]) == expected[name] for name, given in shapes.items())
    )


def _broken(what: str) -> CheckpointError:
    return CheckpointError(f"it is no whole prefix: {what}.", hint="get the file again.")


def _whole(size: object) -> int:
    if not isinstance(size, int) or size < 0:
        raise ValueError(size)
    return size


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is no JSON.")


# --- the whole --------------------------------------------------------------------------------------------------------


def read_artifact(path: str | Path) -> Prefix:
    """Read a prefix, checking all of it but whether it fits a model.

    Raises:
        CheckpointError: The file is missing, truncated, no prefix, of a newer format, or holds NaN or infinity; its
            header and its tensors disagree.
    """
    tensors, metadata = read_file(path)
    if HEADER_KEY not in metadata:
        raise CheckpointError(
            f"{str(path)!r} is a safetensors file, but not a prefix.", hint="give a file that `prefixtune train` wrote."
        )
    header = read_json(metadata[HEADER_KEY], path)
    version = header.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION or version < 1:
        raise CheckpointError(
            f"{str(path)!r} has format version {version!r}, but this prefixtune reads up to {FORMAT_VERSION}.",
            hint="upgrade prefixtune.",
        )
    head = _head(tensors, path)
    prefix = Prefix(_layers(tensors, path), header, head)
    for key, fact in describe_tensors(prefix).items():
        if key in header and header[key] != fact:
            what = key.replace("_", " ")
            raise CheckpointError(
                f"the header of {str(path)!r} says {what} {header[key]!r}, but its tensors say {fact!r}.",
                hint="the file was altered or made otherwise; get it again.",
            )
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again, or train it again.")
    return prefix


def describe_tensors(prefix: Prefix) -> dict[str, Any]:
    """What a header says of a prefix's tensors."""
    origin = prefix.header.get("backbone")
    kind = origin.get("kind", "decoder") if isinstance(origin, Mapping) else "decoder"
    shifts = kind == "decoder" and prefix.sites == ("decoder",)
    if prefix.placement == "infix" and shifts:
        kind = "infix"
    return {
        "sites": list(prefix.sites),
        "prefix_length": {site: prefix.length(site) for site in prefix.sites},
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
    if not fits or weight is None or bias is None or not (weight.is_floating_point() and bias.is_floating_point()):
        raise CheckpointError(f"{str(path)!r} holds a head that is not whole.", hint="get the file again.")
    return Head(weight, bias)


def _layers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[str, tuple[KeyValue, ...]]:
    """Tensors by name -> per site the layers in order; every fault is named."""
    found: dict[str, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None or not tensor.is_floating_point():
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {tensor.dtype}, which is no part of a prefix.",
                hint="give a file that `prefixtune train` wrote.",
            )
        site, number, part = match.groups()
        found.setdefault(site, {}).setdefault(int(number), {})[part] = tensor
    layers: dict[str, tuple[KeyValue, ...]] = {}
    for site, numbered in found.items():
        if sorted(numbered) != list(range(len(numbered))) or any(len(pair) != 2 for pair in numbered.values()):
            raise CheckpointError(f"{str(path)!r} lacks some layers of site {site!r}.", hint="get the file again.")
        layers[site] = tuple((numbered[n]["key"], numbered[n]["value"]) for n in range(len(numbered)))
    try:
        Prefix(layers)
    except ConfigError as error:
        raise CheckpointError(f"{str(path)!r}: {error.message}", hint="get the file again.") from error
    return layers


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata.

    Raises:
        CheckpointError: It is missing or truncated.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}.", hint="check the path.")
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{str(path)!r} is no whole safetensors file: {error}.", hint="it may be truncated; get it again."
        ) from error


def read_json(text: str, path: str | Path) -> dict[str, Any]:
    """The object that a file's metadata holds.

    Raises:
        CheckpointError: It is none.
    """
    try:
        value = json.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header of {str(path)!r} is no JSON: {error}.", hint="get the file again."
        ) from error
    if not isinstance(value, dict):
        raise CheckpointError(f"the header of {str(path)!r} is no JSON object.", hint="get the file again.")
    return value
