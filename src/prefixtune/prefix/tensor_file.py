"""A safetensors file with a checked JSON header and a checksum of all of it: prefixes, and states of training runs."""

from __future__ import annotations

import ctypes
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from prefixtune.errors import CheckpointError, PrefixError, causes, first_line
from prefixtune.prefix.header import check_version, dump_header, parse_header

_CHECKSUM_KEY = "prefixtune_checksum"
"""The checksum's key in the file's metadata, next to the header that it covers."""


class TornFileError(CheckpointError):
    """A file is truncated, or its checksum does not match: it is damaged, or somebody wrote to it meanwhile."""


def read_file(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A safetensors file's tensors and metadata.

    Raises:
        CheckpointError: It is missing or truncated, or may not or cannot be read now; see `is_unread`.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise CheckpointError(f"there is no file {str(path)!r}.", hint="check the path.")
        # safetensors says of a file that may not be read that there is none.
        with open(path, "rb"), safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in handle.keys()}, handle.metadata() or {}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        raise TornFileError(
            f"{str(path)!r} is not a complete safetensors file: {error}.", hint="it may be truncated; get it again."
        ) from error
    except (OSError, RuntimeError) as error:
        # A RuntimeError of torch: the system opens no more files, or maps none into memory.
        refusal = error if isinstance(error, OSError) else OSError(str(error))
        raise CheckpointError(
            f"{str(path)!r} cannot be read: {refusal.strerror or first_line(refusal)}.",
            hint="check its permissions, or try again.",
        ) from refusal


def is_unread(error: PrefixError) -> bool:
    """Whether the system refused to read a file, which may pass, rather than that the file is broken."""
    return any(isinstance(one, OSError) for one in causes(error))


def read_verified(path: str | Path, key: str, otherwise: str, hint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors and header, compared with their checksum.

    Args:
        path: The file.
        key: The header's key in the metadata.
        otherwise: What a message says of a file without such a header.
        hint: What it says to do about that.

    Raises:
        CheckpointError: The file is missing, truncated, damaged, not of this kind, or of an unknown version.
    """
    tensors, metadata = read_file(path)
    if key not in metadata:
        raise CheckpointError(f"{str(path)!r} {otherwise}.", hint=hint)
    header = _read_header(metadata[key], path)
    if metadata.get(_CHECKSUM_KEY) != _checksum(tensors, metadata[key]):
        raise TornFileError(
            f"{str(path)!r} is damaged: its checksum is not the one it was stored with.",
            hint="get the file again.",
        )
    return tensors, header


def _read_header(text: str, path: str | Path) -> dict[str, Any]:
    """The header in a file's metadata, of a known version.

    Raises:
        CheckpointError: It is not a JSON object, or of an unknown version.
    """
    try:
        header = parse_header(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header of {str(path)!r} cannot be read as a JSON object: {error}.", hint="get the file again."
        ) from error
    check_version(header, repr(str(path)))
    return header


def save_file(tensors: dict[str, Tensor], path: str | Path, metadata: dict[str, str]) -> None:
    """Store tensors with sorted metadata, so that equal contents make equal files.

    The library itself writes metadata in an order that changes from call to call.
    """
    safetensors.save_file(tensors, path, metadata)
    with open(path, "r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header = {"__metadata__": dict(sorted(header.pop("__metadata__").items())), **header}
        file.seek(8)
        file.write(json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def _checksum(tensors: Mapping[str, Tensor], header: str) -> str:
    """SHA-256 of the header's text and of every tensor's name, type, shape and bytes, in the order of names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        stored = tensor.detach().cpu().contiguous()
        shape = ",".join(map(str, stored.shape))
        digest.update(f"\n{name} {str(stored.dtype).removeprefix('torch.')} {shape}\n".encode())
        if stored.nbytes:
            # Hashed in place: no copy, and no numpy, which has no bfloat16.
            digest.update((ctypes.c_char * stored.nbytes).from_address(stored.data_ptr()))
    return f"sha256:{digest.hexdigest()}"


def hash_tensors(tensors: Mapping[str, Tensor]) -> str:
    """`sha256:` and 64 digits of tensors alone: their names, types, shapes and bytes."""
    return _checksum(tensors, "")


def metadata_with_checksum(key: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """A file's metadata: the header as JSON, with the version of the format, and the checksum of it and of the tensors.

    Raises:
        CheckpointError: The header could not be read again.
    """
    text = dump_header(header)
    return {key: text, _CHECKSUM_KEY: _checksum(tensors, text)}
