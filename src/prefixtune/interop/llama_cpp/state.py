"""The bytes of llama.cpp's saved sequence states: written from scratch, or into a state that a build has saved.

Layout, little-endian. File: magic, version, number of tokens, tokens, cells. Blob (`llama_state_seq_set_data`): magic,
sequence, cells. Cells: number of streams; per stream the number of cells (0: it is skipped) and per cell its position,
the number of its sequences and these; whether values are transposed; number of layers; from version 4 on whether keys
and values are rotated; then every layer's keys, then every layer's values. Rows are cells: (P, H * D).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import CheckpointError, ConfigError

__all__ = ["KV_TYPES", "STATE_VERSIONS", "Rows", "check_choice", "encode_blob", "encode_file", "patch_file"]


STATE_VERSIONS = (2, 3, 4)

KV_TYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (30, torch.bfloat16)}
"""A cache's type (`--cache-type-k`) -> ggml's number, and the torch dtype."""

Rows = tuple[Float[Tensor, "P _K"], Float[Tensor, "P _V"]]
"""One layer's keys and values as llama.cpp stores them: one row per position, head after head."""

_FILE, _BLOB = 0x67677371, 0xAF143CD8
_QUANTIZED = (
    "some builds rotate quantized caches and all round them, which a prefix was not trained for: start the "
    "server with --cache-type-k f16 --cache-type-v f16, and save the slot again."
)


def encode_file(
    rows: Sequence[Rows], tokens: Sequence[int], *, version: int = 4, kv_type: str = "f16", transposed: bool = False
) -> bytes:
    """A sequence-state file.

    Args:
        rows: Per layer, keys and values, one row per position.
        tokens: The placeholders, one per position.
        version: The layout's version, see `STATE_VERSIONS`; a build of llama.cpp refuses all versions but its own.
        kv_type: The cache's type.
        transposed: Whether the cache stores values transposed, as it does without flash attention.
    """
    head = struct.pack(f"<III{len(tokens)}i", _FILE, version, len(tokens), *tokens)
    return head + _encode_cells(rows, version, kv_type, transposed)


def encode_blob(rows: Sequence[Rows], *, version: int = 4, kv_type: str = "f16", transposed: bool = False) -> bytes:
    """The same for `llama_state_seq_set_data`, which takes no tokens."""
    return struct.pack("<Ii", _BLOB, 0) + _encode_cells(rows, version, kv_type, transposed)


def check_choice(version: int, kv_type: str) -> None:
    """Refuse an unknown layout.

    Raises:
        ConfigError: The version or the type is unknown.
    """
    if version not in STATE_VERSIONS or kv_type not in KV_TYPES:
        raise ConfigError(
            f"state version {version!r} with a cache of {kv_type!r}; known are versions "
            f"{', '.join(map(str, STATE_VERSIONS))} with {', '.join(KV_TYPES)}.",
            hint="let your own build save a slot, and pass it with --patch.",
        )


def _encode_cells(rows: Sequence[Rows], version: int, kv_type: str, transposed: bool) -> bytes:
    check_choice(version, kv_type)
    ggml_type, dtype = KV_TYPES[kv_type]
    count = rows[0][0].shape[0]
    parts = [struct.pack("<II", 1, count)]
    parts += [struct.pack("<iIi", position, 1, 0) for position in range(count)]
    parts.append(struct.pack("<II", transposed, len(rows)))
    if version >= 4:
        parts.append(struct.pack("<II", 0, 0))
    for key, _ in rows:
        parts += [struct.pack("<iQ", ggml_type, key.shape[1] * dtype.itemsize), _raw(key, dtype)]
    for _, value in rows:
        if transposed:
            parts += [struct.pack("<iII", ggml_type, dtype.itemsize, value.shape[1]), _raw(value.T, dtype)]
        else:
            parts += [struct.pack("<iQ", ggml_type, value.shape[1] * dtype.itemsize), _raw(value, dtype)]
    return b"".join(parts)


def _raw(rows: Tensor, dtype: torch.dtype) -> bytes:
    cast = rows.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        raise ConfigError(
            f"the prefix has numbers up to {float(rows.abs().max()):.3g}, which {dtype} cannot hold.",
            hint="use --kv-type f32, and start llama.cpp with --cache-type-k f32 --cache-type-v f32.",
        )
    return cast.view(torch.uint8).numpy().tobytes()


# --- patching a slot -------------------------------------------------------------------------------------------------


class _Reader:
    """Reads a state file from front to back."""

    def __init__(self, data: bytes, name: str) -> None:
        self.data, self.name, self.offset = data, name, 0

    def take(self, layout: str) -> tuple[int, ...]:
        try:
            values = struct.unpack_from(f"<{layout}", self.data, self.offset)
        except struct.error as error:
            raise self.fault(
                f"ends within its part at byte {self.offset}", "it is cut short; save it again."
            ) from error
        self.offset += struct.calcsize(f"<{layout}")
        return values

    def skip(self, count: int) -> int:
        """Skip bytes; returns the offset of the first."""
        start = self.offset
        if start + count > len(self.data):
            raise self.fault(f"ends within its part at byte {start}", "it is cut short; save it again.")
        self.offset += count
        return start

    def fault(self, what: str, hint: str) -> CheckpointError:
        return CheckpointError(f"the slot file {self.name!r} {what}.", hint=hint)


def patch_file(
    data: bytes, rows: Sequence[Rows], tokens: Sequence[int], name: str = "slot"
) -> tuple[bytes, dict[str, Any]]:
    """Overwrite the keys and values in a slot with the placeholders that the user's own build has saved.

    Everything else stays as that build wrote it, so it accepts the file.

    Args:
        data: The file.
        rows: Per layer, keys and values, one row per position.
        tokens: The placeholders.
        name: The file's name, for messages.

    Returns:
        The new file, and its layout: version, type of the cache, whether values are transposed.

    Raises:
        CheckpointError: It is not a saved slot, of an unknown version, truncated, holds other tokens or a model of
            another shape, or has a cache of a type that cannot hold a prefix (quantized).
    """
    reader = _Reader(data, name)
    magic, version, count = reader.take("III")
    if magic != _FILE:
        raise reader.fault("is not a saved slot of llama.cpp", "save one with `POST /slots/0?action=save`.")
    if version not in STATE_VERSIONS:
        raise reader.fault(
            f"has version {version}; known are {', '.join(map(str, STATE_VERSIONS))}",
            "upgrade prefixtune, or use a build of llama.cpp that writes one of these.",
        )
    stored = reader.take(f"{count}i")
    placeholders = tuple(tokens)
    count = len(placeholders)
    if not any(stored[start : start + count] == placeholders for start in range(len(stored) - count + 1)):
        raise reader.fault(
            f"holds other tokens than the {count} placeholders of this prefix",
            "send the request of placeholders.json to the server, then save the slot.",
        )
    patched, layout = bytearray(data), None
    (streams,) = reader.take("I")
    for _ in range(streams):
        (cells,) = reader.take("I")
        if cells and layout is None:
            layout = _patch_stream(reader, cells, rows, version, patched)
        elif cells:
            raise reader.fault("holds several sequences", "save one slot.")
    if layout is None:
        raise reader.fault("holds no cells", "send the request of placeholders.json to the server, then save the slot.")
    if reader.offset != len(data):
        raise reader.fault(
            f"goes on for {len(data) - reader.offset} bytes behind its layers",
            "models with several caches (sliding windows) or a recurrent state cannot use a prefix in llama.cpp.",
        )
    return bytes(patched), {"state_version": version, **layout}


def _patch_stream(
    reader: _Reader, cells: int, rows: Sequence[Rows], version: int, patched: bytearray
) -> dict[str, Any]:
    """Write the prefix over one stream's keys and values; returns the cache's type and layout."""
    order = _read_positions(reader, cells, rows[0][0].shape[0])
    transposed, num_layers = reader.take("II")
    if num_layers != len(rows):
        raise reader.fault(f"holds {num_layers} layers, but the prefix has {len(rows)}", "load the prefix's own model.")
    if version >= 4 and any(reader.take("II")):
        raise reader.fault("holds rotated keys or values", _QUANTIZED)
    kv_types = []
    for part in (0, 1):
        for layer in rows:
            is_transposed = part == 1 and bool(transposed)
            start, kv_type = _read_tensor(reader, layer[part].shape[1], cells, is_transposed)
            ordered = layer[part][order]
            raw = _raw(ordered.T if is_transposed else ordered, KV_TYPES[kv_type][1])
            patched[start : start + len(raw)] = raw
            kv_types.append(kv_type)
    return {"kv_type": "/".join(dict.fromkeys(kv_types)), "transposed": bool(transposed)}


def _read_positions(reader: _Reader, cells: int, length: int) -> list[int]:
    """Every cell's position, in the order of the file, which may differ from that of the positions."""
    positions: list[int] = []
    for _ in range(cells):
        position, sequences = reader.take("iI")
        reader.skip(4 * sequences)
        positions.append(position)
    if sorted(positions) != list(range(length)):
        raise reader.fault(
            f"holds {cells} cells, not one for each of the {length} placeholders",
            'erase the slot, ask with "n_predict": 0 as placeholders.json does, and save it then.',
        )
    return positions


def _read_tensor(reader: _Reader, width: int, cells: int, transposed: bool) -> tuple[int, str]:
    """The offset and type of one layer's keys or values; the reader continues after them."""
    (ggml_type,) = reader.take("i")
    kv_type = next((name for name, (known, _) in KV_TYPES.items() if known == ggml_type), None)
    if kv_type is None:
        raise reader.fault(f"holds a cache of ggml type {ggml_type}, not one of {', '.join(KV_TYPES)}", _QUANTIZED)
    size = KV_TYPES[kv_type][1].itemsize
    if transposed:
        element_size, stored_width = reader.take("II")
        fits = (element_size, stored_width) == (size, width)
    else:
        (row_size,) = reader.take("Q")
        fits = row_size == width * size
        stored_width = row_size // size
    if not fits:
        raise reader.fault(
            f"holds {stored_width} numbers per position and layer, but the prefix has {width}",
            "load the prefix's own model.",
        )
    return reader.skip(cells * width * size), kv_type
