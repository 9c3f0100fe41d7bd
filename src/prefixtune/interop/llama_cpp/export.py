"""Writes a prefix as a saved sequence state of llama.cpp.

A state file holds tokens and, per layer, the keys and values of their cells. Here the cells are the prefix, and the
tokens are placeholders that stand for it in every request. If the slot does not hold them, llama.cpp reads the
placeholders as ordinary tokens, without an error: only `timings.cache_n` of its answer tells.

The backbone must have been converted to a GGUF file by llama.cpp's own tools.
"""

from __future__ import annotations

import importlib.resources
import json
import string
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.lora import has_adapter
from prefixtune.engine.llama_state import encode_file, placeholders_for, rows_of
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.interop.export import README, check_exportable, check_folder, describe_origin, write_manifest
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_files

_RESOURCES = importlib.resources.files("prefixtune.interop.llama_cpp")


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
        prefix: Trained for a decoder-only model of one of the types of `engine.llama_state.LAYOUTS`.
        backbone: That model.
        folder: Gets `NAME.bin` (to be restored into a slot), `ask.json`, `export.json` and `README.md`.
        name: The files' name.
        state_version: The layout's version; see `engine.llama_state.STATE_VERSIONS`.
        kv_type: The type of the cache that it will be restored into; see `engine.llama_state.KV_TYPES`.

    Returns:
        What `export.json` says.

    Raises:
        BackboneError: llama.cpp cannot use a prefix of this backbone; the message says why.
        ConfigError: An unknown version or type, the prefix is empty, or has a head, the folder holds a run, or the
            name has folders.
    """
    if Path(name).name != name:
        raise ConfigError(f"name is {name!r}, which has folders.", hint="name the folder by `folder`.")
    check_folder(folder, "llama.cpp")
    check_exportable(prefix, backbone, "llama.cpp")
    if has_adapter(backbone.model):
        what = f"{backbone.name!r} has a LoRA adapter, and prefixes with one were not tested in llama.cpp."
        raise BackboneError(what, hint="use `prefixtune serve`, or export to ONNX.")
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
        README: readme.substitute(facts, backbone=facts["backbone"]["name"]).encode(),
    }
    with atomic_files(folder) as temporary:
        for file, content in files.items():
            (temporary / file).write_bytes(content)
        write_manifest(temporary, facts)
    return facts
