"""The artifact: a prefix as one small safetensors file, read and checked without any model.

It holds `SITE.LAYER.key` and `SITE.LAYER.value` tensors of shape (H, P, D), `head.weight` and `head.bias` where a head
was trained, a JSON header under the metadata key `prefixtune`, and a checksum of all of it. `docs/format.md` has the
whole schema. All that reads it needs is torch and safetensors, so that engines with libraries of their own can. Knows
nothing of backbones but the shapes that it is told.
"""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import os
import re
import struct
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError, PrefixWarning, describe_value, did_you_mean
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import Geometry, Site
from prefixtune.prefix.hub import FILE, download, is_repository, repository_of
from prefixtune.prefix.prefix import Head, KeyValue, Prefix
from prefixtune.prefix.text_format import read_text_format
from prefixtune.utils.files import atomic_path

__all__ = [
    "DTYPES",
    "FORMAT_VERSION",
    "HEADER_KEY",
    "Outline",
    "check_header",
    "check_storable",
    "checked_metadata",
    "describe_tensors",
    "parse_header",
    "prefix_file",
    "read_artifact",
    "read_checked",
    "read_file",
    "read_outline",
    "reasons_against",
    "save_file",
    "save_prefix",
]


FORMAT_VERSION = 2
"""Of what is written. Version 1 had no checksum; it is read, too."""

_POSITIONS = {
    "decoder": "text starts at position P",
    "encoder-decoder": "text positions are not shifted",
    "encoder": "text positions are not shifted",
    "infix": "the source starts at position 0, the target P behind it",
}
"""The position convention by kind of model, recorded in every artifact for each site."""

HEADER_KEY = "prefixtune"
"""Where the header stands among the file's metadata."""

_CHECKSUM_KEY = "prefixtune_checksum"
"""Where the checksum stands, beside the header that it covers."""

_NAME = re.compile(r"^(encoder|decoder|cross)\.(\d{1,5})\.(key|value)$")
_TENSOR = re.compile(r"(encoder|decoder|cross)\.\d{1,5}\.(key|value)|head\.(weight|bias)")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES = 2**20
"""Longest header that is read or written, as it stands in a file: an ordinary one has a few thousand bytes."""
_TENSORS_BYTES = 2**18
"""Most bytes of a prefix's table of tensors, which has about a hundred for each."""
_ROOM = 2**12
"""Bytes that a header may grow by while its prefix is trained."""
_HEADER_DEPTH = 16
"""Most objects and lists within each other in a header."""

_FIELDS: Mapping[str, type] = {
    "adapter": str,
    "backbone": dict,
    "backbone.fingerprint": str,
    "backbone.kind": str,
    "backbone.name": str,
    "description": str,
    "initialization": dict,
    "labels": dict,
    "labels.by": str,
    "labels.kind": str,
    "labels.names": list,
    "labels.words": list,
    "license": str,
    "made_with": dict,
    "method": str,
    "peft": dict,
    "placement": str,
    "task": str,
    "text_format": dict,
    "text_format.end": str,
    "text_format.prompt": str,
    "text_format.separator": str,
    "text_format.source": str,
    "text_format.target": str,
    "training": dict,
}
"""Types of the header's fields, where they are given; what else stands there is kept as it is."""
_WORDS: Mapping[type, str] = {str: "a text", dict: "an object", list: "a list of texts"}


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
        if not 2 <= length <= min(_HEADER_BYTES + _TENSORS_BYTES, size - 8):
            raise _broken(f"its header would take {length} bytes")
        text = handle.read(length)
    try:
        tensors = json.loads(text)
        header = parse_header(tensors.pop("__metadata__")[HEADER_KEY])
        shapes = {name: tuple(map(_whole, fact["shape"])) for name, fact in tensors.items()}
        expected = sum(math.prod(shapes[name]) * _ITEM_BYTES[fact["dtype"]] for name, fact in tensors.items())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _broken("its header is not that of a prefix") from error
    _check_version(header, "it")
    check_header(header, "it")
    if expected != size - 8 - length:
        raise _broken(f"its header tells of {expected} bytes, but {size - 8 - length} follow")
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
        stored = origin.get("fingerprint", fingerprint) if isinstance(origin, dict) else fingerprint
        if not fingerprints_match(str(stored), fingerprint):
            reasons.append(f"it was trained for other weights than those of {name!r}")
    return reasons


def _fits(shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> bool:
    expected = {}
    named = {name.partition(".")[0] for name in shapes}
    for site, layers in geometry.items():
        for number, shape in enumerate(layers if site in named else ()):
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


# --- the header -------------------------------------------------------------------------------------------------------


def _read_header(text: str, path: str | Path) -> dict[str, Any]:
    """The header that a file's metadata holds, of a version that is known.

    Raises:
        CheckpointError: It is no JSON object, or of an unknown version.
    """
    try:
        header = parse_header(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header of {str(path)!r} is no JSON object that can be read: {error}.", hint="get the file again."
        ) from error
    _check_version(header, repr(str(path)))
    return header


def parse_header(text: str) -> dict[str, Any]:
    """A header's JSON, which may come from anybody.

    Raises:
        ValueError: It is too long or too deep, no object, or holds what is no JSON: NaN, infinity, half a character.
    """
    # As a text within the JSON of the file; half a character, which is refused below, counts as what it would be.
    size = len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > _HEADER_BYTES:
        raise ValueError(f"it takes {size:,} bytes, but may take {_HEADER_BYTES:,}")
    try:
        value = json.loads(text)
        # Numbers such as 1e999 are read as infinity, and half a character as a text.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it nests more than {_HEADER_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if _is_deeper(value, _HEADER_DEPTH):
        raise ValueError(f"it nests more than {_HEADER_DEPTH} levels")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(each, levels - 1) for each in inner)


def _check_version(header: Mapping[str, Any], what: str) -> None:
    version = header.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise CheckpointError(
            f"{what} cannot be read: its format version is {version!r}, but this prefixtune reads up to "
            f"{FORMAT_VERSION}.",
            hint="upgrade prefixtune, or get the file again.",
        )


def check_header(header: Mapping[str, Any], what: str) -> None:
    """See to it that the fields which are read by others are of the types that they expect.

    Raises:
        CheckpointError: One is not, or the text format cannot be used.
    """
    for field, kind in _FIELDS.items():
        name, _, inner = field.partition(".")
        value = header.get(name)
        if inner:
            # The object itself was checked before.
            value = value.get(inner) if isinstance(value, Mapping) else None
        fits = isinstance(value, Mapping if kind is dict else (list, tuple) if kind is list else kind)
        if fits and kind is list:
            fits = all(isinstance(each, str) for each in value or ())
        if value is not None and not fits:
            raise CheckpointError(
                f"the header of {what} says {field} {str(value)[:80]!r}, but it must be {_WORDS[kind]}.",
                hint="docs/format.md lists the fields; get the file again.",
            )
    labels = header.get("labels")
    if labels is not None and any(labels.get(key) is None for key in ("kind", "by", "names")):
        raise CheckpointError(
            f"the header of {what} says labels, but not their kind, by and names.", hint="get the file again."
        )
    try:
        read_text_format(header)
    except CheckpointError as error:
        raise CheckpointError(f"{what} cannot be used: {error.message}", hint=error.hint) from error


# --- the checksum -----------------------------------------------------------------------------------------------------


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """SHA-256 of the header's text and of every tensor's name, type, shape and bytes, in the order of names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        kept = tensor.detach().cpu().contiguous()
        shape = ",".join(map(str, kept.shape))
        digest.update(f"\n{name} {str(kept.dtype).removeprefix('torch.')} {shape}\n".encode())
        if kept.nbytes:
            # The numbers where they are: neither a copy nor numpy.
            digest.update((ctypes.c_char * kept.nbytes).from_address(kept.data_ptr()))
    return f"sha256:{digest.hexdigest()}"


def checked_metadata(key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A file's metadata: the header as JSON, with the version of the format, and the checksum of it and of the tensors.

    Raises:
        CheckpointError: The header could not be read again.
    """
    text = _header_text(header)
    return {key: text, _CHECKSUM_KEY: _checksum(tensors, text)}


def check_storable(header: Mapping[str, Any]) -> None:
    """See to it, before long work, that a header can be stored, with some room for the figures of the outcome.

    Raises:
        CheckpointError: It is too long, or could not be read again.
    """
    _header_text({**header, "room": "0" * _ROOM})


def _header_text(header: Mapping[str, Any]) -> str:
    """A header as JSON, with the version of the format; it can be read again."""
    text = json.dumps({**header, "format_version": FORMAT_VERSION}, ensure_ascii=False)
    try:
        parse_header(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header cannot be stored: {error}.", hint="make labels, templates and descriptions shorter."
        ) from error
    return text


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Store tensors, with the metadata in the order of their names, so that what is equal is stored as equal files.

    The library itself writes metadata in an order that changes from call to call.
    """
    safetensors.save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def read_checked(path: str | Path, key: str, otherwise: str, hint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and header, compared with the checksum that they were stored with.

    Args:
        path: The file.
        key: Where its header stands among the metadata.
        otherwise: What to say of a file that has no such header, and in `hint` what to do about it.
        hint: See there.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, something else, or of an unknown version.
    """
    tensors, metadata = read_file(path)
    if key not in metadata:
        raise CheckpointError(f"{str(path)!r} {otherwise}.", hint=hint)
    header = _read_header(metadata[key], path)
    checksum = metadata.get(_CHECKSUM_KEY)
    if checksum is None and header["format_version"] == 1:
        _note_unverified(Path(path).name)
    elif checksum != _checksum(tensors, metadata[key]):
        raise CheckpointError(
            f"{str(path)!r} is damaged: it does not have the checksum that it was stored with.",
            hint="get the file again.",
        )
    return tensors, header


_unverified = itertools.count()


def _note_unverified(name: str) -> None:
    """Warn of a file without a checksum; once a process, as a server may read thousands."""
    if next(_unverified) == 0:
        warnings.warn(
            f"{name!r} is of format version 1, which has no checksum: damage to it would go unnoticed. Stored again "
            "(`prefixtune convert OLD NEW --to prefixtune`), a prefix has one. This is said of the first such file.",
            PrefixWarning,
            stacklevel=3,
        )


# --- the whole --------------------------------------------------------------------------------------------------------


def read_artifact(path: str | Path) -> Prefix:
    """Read a prefix, checking all of it but whether it fits a model.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, no prefix, of an unknown version, or holds NaN or
            infinity; its header and its tensors disagree.
    """
    tensors, header = read_checked(
        path, HEADER_KEY, "is a safetensors file, but not a prefix", "give a file that `prefixtune train` wrote."
    )
    check_header(header, repr(str(path)))
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


def _layers(tensors: Mapping[str, Tensor], path: str | Path) -> dict[Site, tuple[KeyValue, ...]]:
    """Tensors by name -> per site the layers in order; every fault is named."""
    found: dict[Site, dict[int, dict[str, Tensor]]] = {}
    for name, tensor in tensors.items():
        match = _NAME.match(name)
        if match is None or not tensor.is_floating_point():
            raise CheckpointError(
                f"{str(path)!r} holds {name!r} of type {tensor.dtype}, which is no part of a prefix.",
                hint="give a file that `prefixtune train` wrote.",
            )
        site, number, part = match.groups()
        found.setdefault(cast(Site, site), {}).setdefault(int(number), {})[part] = tensor
    layers: dict[Site, tuple[KeyValue, ...]] = {}
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


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_prefix(path: str | os.PathLike[str], prefix: Prefix, *, dtype: torch.dtype | str = torch.float32) -> Path:
    """Store a prefix as one file: the tensors and its header.

    Args:
        path: Ends with `.safetensors`.
        prefix: With its header; see `make_header`.
        dtype: float32, or bfloat16 for half the size; or its name.

    Raises:
        CheckpointError: The prefix holds NaN or infinity, or the path has another ending.
        ConfigError: An argument is something else.
        PrefixError: The file cannot be written.
    """
    if not isinstance(path, str | os.PathLike) or not isinstance(prefix, Prefix):
        raise ConfigError(
            f"path is {describe_value(path)} and prefix {describe_value(prefix)}, but must be a path and a Prefix.",
            hint="write save_prefix(path, prefix).",
        )
    if not isinstance(dtype, torch.dtype):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}.", hint=did_you_mean(str(dtype), DTYPES))
        dtype = DTYPES[dtype]
    path = Path(path)
    if path.suffix != ".safetensors":
        raise CheckpointError(
            f"{str(path)!r} does not end with .safetensors.", hint=f"write to {path.stem}.safetensors."
        )
    stored = prefix.detach().to(dtype, "cpu")
    if not stored.is_finite():
        raise CheckpointError(f"the prefix for {str(path)!r} holds NaN or infinity.", hint="train it again.")
    header = {**prefix.header, **describe_tensors(stored)}
    check_header(header, f"the prefix for {str(path)!r}")
    tensors = {
        f"{site}.{number}.{part}": tensor.contiguous()
        for site, layers in stored.layers.items()
        for number, pair in enumerate(layers)
        for part, tensor in zip(("key", "value"), pair, strict=True)
    }
    if stored.head is not None:
        tensors |= {"head.weight": stored.head.weight.contiguous(), "head.bias": stored.head.bias.contiguous()}
    with atomic_path(path) as temporary:
        save_file(tensors, temporary, checked_metadata(HEADER_KEY, header, tensors))
    return path


def prefix_file(path: str | os.PathLike[str]) -> Path:
    """The file that is meant by a path, by a run's folder, or by `hub:OWNER/NAME`, which is downloaded.

    Raises:
        CheckpointError: There is nothing of that name, or a folder without a prefix.
        ConfigError: `path` is no path.
        PrefixError: The hub cannot be reached, or has no such file.
    """
    if not isinstance(path, str | os.PathLike):
        inner = " (its `.prefix` is one)" if isinstance(getattr(path, "prefix", None), Prefix) else ""
        raise ConfigError(
            f"the prefix is {describe_value(path)}{inner}, but must be a path, hub:OWNER/NAME or a Prefix.",
            hint='give "runs/e2e/prefix.safetensors", say, or a list of prefixes, one per text.',
        )
    repository = repository_of(path)
    if repository is not None:
        return download(repository)
    try:
        return _on_this_machine(Path(path))
    except OSError as error:
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error


def _on_this_machine(path: Path) -> Path:
    if path.is_dir():
        if not (path / FILE).is_file():
            raise CheckpointError(
                f"there is no file {FILE} in the folder {str(path)!r}.",
                hint="give a file, or the --output folder of a training that came to its end; runs of other methods go "
                "with --run of `prefixtune generate` and `evaluate`.",
            )
        return path / FILE
    if is_repository(path) and path.suffix != ".safetensors" and not path.exists():
        raise CheckpointError(
            f"there is no file or folder {str(path)!r}.", hint=f"check the path; hub:{path} is fetched from the hub."
        )
    return path
