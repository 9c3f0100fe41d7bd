"""Writes a prefix as a saved sequence state of llama.cpp.

A state file holds tokens and, per layer, the keys and values of their cells. Here the cells are the prefix, and the
tokens are placeholders that stand for it in every request. If the slot does not hold them, llama.cpp reads the
placeholders as ordinary tokens, without an error: `check.py`, exported with the file, asks a running server.

The backbone must have been converted to a GGUF file by llama.cpp's own tools.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import random
import string
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError
from prefixtune.interop.export import README, check_exportable, check_folder, describe_origin, write_manifest
from prefixtune.interop.llama_cpp.state import Rows, encode_file
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_files

__all__ = ["LAYOUTS", "export_llama_cpp", "placeholders_for", "rows_of"]


_RESOURCES = importlib.resources.files("prefixtune.interop.llama_cpp")

LAYOUTS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False, "gpt2": False}
"""Model types that were compared with llama.cpp -> whether its conversion interleaves the two rotated halves."""


def rows_of(prefix: Prefix, backbone: Backbone) -> list[Rows]:
    """A prefix's keys and values in llama.cpp's order.

    Where the conversion to GGUF interleaves the two halves of a head that are rotated against each other (`llama`), so
    are the keys here: index 2i + s there is index s * D/2 + i here. Values are not.

    Raises:
        BackboneError: The model type was not compared with llama.cpp.
    """
    model_type = str(backbone.model.config.model_type)
    if model_type not in LAYOUTS:
        raise BackboneError(
            f"{backbone.name!r} is of model type {model_type!r}, whose keys were never compared with llama.cpp's; "
            f"compared were {', '.join(LAYOUTS)}.",
            hint="use `prefixtune serve`, or another target.",
        )
    rows = []
    for key, value in prefix.layers["decoder"]:
        if LAYOUTS[model_type]:
            key = key.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        rows.append((_as_rows(key), _as_rows(value)))
    return rows


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


def export_llama_cpp(
    prefix: Prefix,
    backbone: Backbone,
    folder: str | Path,
    *,
    name: str = "prefix",
    state_version: int = 4,
    kv_type: str = "f16",
) -> dict[str, Any]:
    """Write what llama.cpp needs for a prefix, and how to use and check it.

    Args:
        prefix: Trained for a decoder-only model of one of `LAYOUTS`.
        backbone: That model.
        folder: Gets `NAME.bin` (to be restored into a slot), `ask.json`, `check.py`, `export.json` and `README.md`.
        name: The files' name.
        state_version: The layout's version; see `state.STATE_VERSIONS`.
        kv_type: The type of the cache that it will be restored into; see `state.KV_TYPES`.

    Returns:
        What `export.json` says.

    Raises:
        BackboneError: llama.cpp cannot use a prefix of this backbone; the message says why.
        ConfigError: An unknown version or type, the prefix is empty, or has a head, or the folder holds a
            run.
    """
    check_folder(folder)
    check_exportable(prefix, backbone, "llama.cpp")
    if backbone.adapter is not None:
        raise BackboneError(
            f"{backbone.name!r} has a LoRA adapter, and prefixes with one were not tested in llama.cpp.",
            hint="use `prefixtune serve`, or export to ONNX.",
        )
    rows, placeholders, folder = rows_of(prefix, backbone), placeholders_for(prefix, backbone), Path(folder)
    facts = {
        "target": "llama.cpp",
        "file": f"{name}.bin",
        **describe_origin(prefix, backbone),
        "state_version": state_version,
        "kv_type": kv_type,
        "placeholders": placeholders,
    }
    prompt = facts["text_format"]["prompt"].replace("{source}", "...")
    ask = {"prompt": [*placeholders, prompt], "temperature": 0, "cache_prompt": True, "id_slot": 0}
    readme = string.Template((_RESOURCES / "readme.md").read_text(encoding="utf-8"))
    files = {
        facts["file"]: encode_file(rows, placeholders, version=state_version, kv_type=kv_type),
        "ask.json": f"{json.dumps(ask, ensure_ascii=False)}\n".encode(),
        "check.py": (_RESOURCES / "check.py").read_bytes(),
        README: readme.substitute(facts, backbone=facts["backbone"]["name"]).encode(),
    }
    with atomic_files(folder) as temporary:
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        write_manifest(temporary, facts)
    return facts
