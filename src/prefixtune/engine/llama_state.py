"""A prefix as llama.cpp takes it: the bytes of its saved sequence states, and files of them.

Layout, little-endian: magic, version, number of tokens, tokens, cells. Cells: number of streams; the number of cells,
and per cell its position, the number of its sequences and these. Then whether values are transposed, the number of
layers, and from version 4 on whether keys and values are rotated. Then every layer's keys, then every layer's values.
Rows are cells: (P, H * D).
"""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix

STATE_VERSIONS = (2, 3, 4)

KV_TYPES = {"f32": (0, torch.float32), "f16": (1, torch.float16), "bf16": (30, torch.bfloat16)}
"""A cache's type (`--cache-type-k`) -> ggml's number, and the torch dtype."""

Rows = tuple[Float[Tensor, "P _K"], Float[Tensor, "P _V"]]
"""One layer's keys and values as llama.cpp stores them: one row per position, head after head."""

_FILE = 0x67677371


LAYOUTS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False, "gpt2": False}
"""Model types that were compared with llama.cpp -> whether its conversion interleaves the two rotated halves."""


def rows_of(prefix: Prefix, backbone: Backbone) -> list[Rows]:
    """A prefix's keys and values in llama.cpp's order.

    Where the conversion to GGUF interleaves the two halves of a head that are rotated against each other (`llama`), so
    are the keys here: index 2i + s there is index s * D/2 + i here. Values are not.

    Raises:
        BackboneError: The model type was not compared with llama.cpp.
    """
    rows, interleaved = [], is_interleaved(backbone)
    for key, value in prefix.layers["decoder"]:
        if interleaved:
            key = key.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        rows.append((_as_rows(key), _as_rows(value)))
    return rows


def is_interleaved(backbone: Backbone) -> bool:
    """Whether the conversion to GGUF interleaves the two rotated halves.

    Raises:
        BackboneError: The model type was not compared with llama.cpp.
    """
    model_type = str(backbone.model.config.model_type)
    if model_type not in LAYOUTS:
        what = f"keys of {backbone.name!r}, a {model_type!r}, were never compared with llama.cpp's."
        raise BackboneError(what, hint=f"use the engine torch, or a model of type {', '.join(LAYOUTS)}.")
    return LAYOUTS[model_type]


def _as_rows(tensor: Float[Tensor, "H P D"]) -> Float[Tensor, "P _HD"]:
    return tensor.detach().transpose(0, 1).flatten(1).float().cpu()


def placeholders_for(prefix: Prefix, backbone: Backbone) -> list[int]:
    """P ordinary token ids that stand for this prefix; the same at every export.

    They depend on the prefix's numbers, so a slot with another prefix of this length is not mistaken for this one.
    """
    digest = hashlib.sha256()
    for tensor in prefix.tensors():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    special = set(backbone.tokenizer.all_special_ids) | set(getattr(backbone.tokenizer, "added_tokens_decoder", {}))
    size = min(len(backbone.tokenizer), int(backbone.model.get_input_embeddings().weight.shape[0]))
    ordinary = [token_id for token_id in range(size) if token_id not in special]
    return random.Random(digest.digest()).choices(ordinary, k=prefix.prefix_length)


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

    Raises:
        ConfigError: The version or the type is unknown, or the type cannot hold a number.
    """
    if version not in STATE_VERSIONS or kv_type not in KV_TYPES:
        known = f"versions {', '.join(map(str, STATE_VERSIONS))} with {', '.join(KV_TYPES)}"
        what = f"state version {version!r} with a cache of {kv_type!r} is unknown."
        raise ConfigError(what, hint=f"use a build of llama.cpp that reads one of {known}.")
    ggml_type, dtype = KV_TYPES[kv_type]
    count = rows[0][0].shape[0]
    parts = [struct.pack(f"<III{len(tokens)}i", _FILE, version, len(tokens), *tokens), struct.pack("<II", 1, count)]
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


def version_of(saved: bytes) -> int:
    """The version of a state's layout."""
    return int(struct.unpack_from("<II", saved)[1])


def _raw(rows: Tensor, dtype: torch.dtype) -> bytes:
    cast = rows.to(dtype).contiguous()
    if not torch.isfinite(cast).all():
        what = f"the prefix has numbers up to {float(rows.abs().max()):.3g}, which {dtype} cannot hold."
        hint = "use --kv-type f32, and start llama.cpp with --cache-type-k f32 --cache-type-v f32."
        raise ConfigError(what, hint=hint)
    return cast.view(torch.uint8).numpy().tobytes()
