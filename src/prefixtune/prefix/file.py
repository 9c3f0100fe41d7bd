"""A safetensors file with a JSON header and a checksum of all of it: prefixes, trained weights, and states of runs.

`docs/format.md` has the whole schema. What a file holds may come from anybody: it is bounded and checked here, once.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors import torch as safetensors
from torch import Tensor

from prefixtune.errors import CheckpointError, PrefixError, causes, first_line
from prefixtune.prefix.header import HEADER_BYTES, dump_header, read_header
from prefixtune.utils.files import atomic_path

HEADER_KEY = "prefixtune"
"""The key of a prefix's header in the file's metadata."""
_CHECKSUM_KEY = "prefixtune_checksum"
"""The checksum's key in the file's metadata, next to the header that it covers."""
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of a prefix's tensors; others, such as float8, cannot be computed with."""
_TENSORS_BYTES = 2**18
"""Longest table of tensors, in bytes; it has about a hundred per tensor."""
_AGAIN = "get the file again."


# --- with the tensors -------------------------------------------------------------------------------------------------


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
        raise CheckpointError(
            f"{str(path)!r} is not a complete safetensors file: {error}.", hint="it may be truncated; get it again."
        ) from error
    except (OSError, RuntimeError) as error:
        # A RuntimeError of torch: the system opens no more files, or maps none into memory.
        hint = "check its permissions, or try again."
        raise CheckpointError(f"{str(path)!r} cannot be read: {first_line(error)}.", hint=hint) from OSError(str(error))


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
    header = read_header(metadata[key], repr(str(path)))
    if metadata.get(_CHECKSUM_KEY) != hash_tensors(tensors, metadata[key]):
        raise CheckpointError(f"{str(path)!r} is damaged: its checksum is not the one it was stored with.", hint=_AGAIN)
    return tensors, header


def save_verified(path: str | Path, tensors: Mapping[str, Tensor], key: str, header: Mapping[str, Any]) -> None:
    """Store tensors, a header with the version of the format, and the checksum of both, as `read_verified` reads them.

    Equal contents make equal files: the library itself writes metadata in an order that changes from call to call.

    Raises:
        CheckpointError: The header could not be read again.
        PrefixError: The file cannot be written; one that was there is untouched.
    """
    text, stored = dump_header(header), {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with atomic_path(Path(path)) as temporary:
        safetensors.save_file(stored, temporary, {key: text, _CHECKSUM_KEY: hash_tensors(stored, text)})
        with open(temporary, "r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            table = json.loads(file.read(length))
            table = {"__metadata__": dict(sorted(table.pop("__metadata__").items())), **table}
            file.seek(8)
            file.write(json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode().ljust(length))


def hash_tensors(tensors: Mapping[str, Tensor], header: str = "") -> str:
    """SHA-256 of a header's text and of every tensor's name, type, shape and bytes, in the order of names."""
    digest = hashlib.sha256(header.encode())
    for name, tensor in sorted(tensors.items()):
        stored = tensor.detach().cpu().contiguous()
        shape = ",".join(map(str, stored.shape))
        digest.update(f"\n{name} {str(stored.dtype).removeprefix('torch.')} {shape}\n".encode())
        if stored.nbytes:
            # Hashed in place: no copy, and no numpy, which has no bfloat16.
            digest.update((ctypes.c_char * stored.nbytes).from_address(stored.data_ptr()))
    return f"sha256:{digest.hexdigest()}"


# --- without the tensors ----------------------------------------------------------------------------------------------


def read_table(path: Path, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A file's tensors without their numbers, on the device `meta`, and its header; its checksum is not compared.

    The file is not mapped into memory: one that is truncated meanwhile would end the process.

    Raises:
        CheckpointError: It is not complete, or not of this kind.
        OSError: It cannot be read.
    """
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(HEADER_BYTES + _TENSORS_BYTES, size - 8):
            raise _broken(f"its header would take {length} bytes")
        text = handle.read(length)
    try:
        table = json.loads(text)
        header = str(table.pop("__metadata__")[key])
        tensors = {
            name: torch.empty(entry["shape"], dtype=_DTYPES[entry["dtype"]], device="meta")
            for name, entry in table.items()
        }
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise _broken("its header is not that of such a file") from error
    expected = sum(tensor.nbytes for tensor in tensors.values())
    if expected != size - 8 - length:
        raise _broken(f"its header announces {expected} bytes, but {size - 8 - length} follow")
    return tensors, read_header(header, "it")


def _broken(what: str) -> CheckpointError:
    return CheckpointError(f"it is not a complete file: {what}.", hint=_AGAIN)
