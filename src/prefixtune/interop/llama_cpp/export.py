"""llama.cpp: a prefix as a saved sequence state, which `llama-server` restores into a slot.

A state file holds tokens and, per layer, the keys and values of their cells. The cells here are the prefix; the tokens
are placeholders that stand for it in every request. Where these are not found in the slot, llama.cpp reads them as
ordinary tokens and says nothing: `check.py`, written beside the file, asks a running server.

Knows nothing of GGUF files: a backbone must have been converted to one by llama.cpp's own tools.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.interop.export import check_exportable, describe_origin, write_manifest
from prefixtune.interop.llama_cpp.state import Rows, encode_blob, encode_file, patch_file
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_files

__all__ = ["LAYOUTS", "export_llama_cpp", "placeholders_for", "rows_of"]


LAYOUTS = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False, "gpt2": False}
"""Model types that were compared with llama.cpp -> whether its conversion interleaves the halves that rotate."""


def rows_of(prefix: Prefix, backbone: Backbone) -> list[Rows]:
    """A prefix's keys and values in llama.cpp's order.

    Where the conversion to GGUF interleaves the two halves of a head that are rotated against each other (`llama`),
    keys follow: index 2i + s there is s * D/2 + i here. Values never do.

    Raises:
        BackboneError: The model type was not compared with llama.cpp.
    """
    kind = str(backbone.model.config.model_type)
    if kind not in LAYOUTS:
        raise BackboneError(
            f"{backbone.name!r} is of model type {kind!r}, whose keys were never compared with llama.cpp's; compared "
            f"were {', '.join(LAYOUTS)}.",
            hint="use `prefixtune serve`, or another target.",
        )
    rows = []
    for key, value in prefix.layers["decoder"]:
        if LAYOUTS[kind]:
            key = key.unflatten(2, (2, -1)).transpose(2, 3).flatten(2)
        rows.append((_as_rows(key), _as_rows(value)))
    return rows


def _as_rows(part: Float[Tensor, "H P D"]) -> Float[Tensor, "P _HD"]:
    return part.detach().transpose(0, 1).flatten(1).float().cpu()


def placeholders_for(prefix: Prefix, backbone: Backbone) -> list[int]:
    """P ordinary token ids that stand for this prefix; the same at every export.

    They follow from its numbers: a slot that holds another prefix of this length is not taken for this one.
    """
    digest = hashlib.sha256()
    for tensor in prefix.tensors():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    special = set(backbone.tokenizer.all_special_ids) | set(getattr(backbone.tokenizer, "added_tokens_decoder", {}))
    size = min(len(backbone.tokenizer), int(backbone.model.get_input_embeddings().weight.shape[0]))
    ordinary = [number for number in range(size) if number not in special]
    return random.Random(digest.digest()).choices(ordinary, k=prefix.prefix_length)


def export_llama_cpp(
    prefix: Prefix,
    backbone: Backbone,
    folder: str | Path,
    *,
    name: str = "prefix",
    state_version: int = 4,
    kv_type: str = "f16",
    slot_file: str | Path | None = None,
) -> dict[str, Any]:
    """Write what llama.cpp needs for a prefix, and how to use and check it.

    Args:
        prefix: Trained for a decoder-only model of one of `LAYOUTS`.
        backbone: That model.
        folder: Gets `NAME.bin` (to be restored into a slot), `NAME.blob` (for `llama_state_seq_set_data`),
            `placeholders.json`, `check.py`, `export.json` and `README.md`.
        name: Of the state.
        state_version: Of the layout; see `state.STATE_VERSIONS`.
        kv_type: Of the cache that it will be restored into; see `state.KV_TYPES`.
        slot_file: A slot that the user's own build saved of the placeholders: it decides on version and type, and no
            blob is written.

    Returns:
        What `export.json` says.

    Raises:
        BackboneError: llama.cpp cannot carry the prefix of this backbone; the message says why.
        CheckpointError: The slot file cannot be patched; the message says why.
        ConfigError: An unknown version or type, or the prefix is empty, an infix, or has a head.
    """
    check_exportable(prefix, backbone, "llama.cpp")
    if backbone.adapter is not None:
        raise BackboneError(
            f"{backbone.name!r} holds a LoRA adapter, with which the prefix was not tried in llama.cpp.",
            hint="use `prefixtune serve`, or export to ONNX.",
        )
    rows, tokens, folder = rows_of(prefix, backbone), placeholders_for(prefix, backbone), Path(folder)
    files: dict[str, bytes] = {}
    if slot_file is not None:
        files[f"{name}.bin"], found = patch_file(_read(Path(slot_file)), rows, tokens, str(slot_file))
    else:
        found = {"state_version": state_version, "kv_type": kv_type, "transposed": False}
        files[f"{name}.bin"] = encode_file(rows, tokens, version=state_version, kv_type=kv_type)
        files[f"{name}.blob"] = encode_blob(rows, version=state_version, kv_type=kv_type)
    states = sorted(files)
    ask = {"prompt": tokens, "n_predict": 0, "cache_prompt": True, "id_slot": 0}
    files["placeholders.json"] = f"{json.dumps(ask)}\n".encode()
    files["check.py"] = (importlib.resources.files("prefixtune.interop.llama_cpp") / "check.py").read_bytes()
    facts = {
        "target": "llama.cpp",
        "file": f"{name}.bin",
        **describe_origin(prefix, backbone),
        **found,
        "patched": slot_file is not None,
        "placeholders": tokens,
    }
    files["README.md"] = _readme(facts, states).encode()
    with atomic_files(folder) as made:
        for file, content in files.items():
            (made / file).write_bytes(content)
        write_manifest(made, facts)
    return facts


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read the slot file {str(path)!r}: {error.strerror or error}.", hint="check the path."
        ) from error


def _readme(facts: dict[str, Any], files: Sequence[str]) -> str:
    """How to use and check the files, with the commands."""
    kv_type = str(facts["kv_type"]).split("/")[0]
    prompt = json.dumps(facts["text_format"]["prompt"].replace("{source}", "..."), ensure_ascii=False)
    attention, layout = ("off", "transposed") if facts["transposed"] else ("on", "in rows")
    blob = (
        f"`{files[-1]}` is the same for `llama_state_seq_set_data` of the C interface: load it into a sequence, and "
        f"decode the text from position {facts['prefix_length']} on.\n"
        if len(files) > 1
        else ""
    )
    return f"""# A prefix of {facts["prefix_length"]} positions for llama.cpp

For a GGUF file made from `{facts["backbone"]["name"]}` ({facts["model_type"]}).
State version {facts["state_version"]}, a cache of {facts["kv_type"]}, values {layout}.

## Start

```bash
mkdir -p slots && cp {facts["file"]} slots/
llama-server --model MODEL.gguf --parallel 1 --cache-type-k {kv_type} --cache-type-v {kv_type} \\
    --flash-attn {attention} --slot-save-path slots/ --port 8080
```

## Restore, check, ask

```bash
curl -X POST 'http://127.0.0.1:8080/slots/0?action=restore' -H 'Content-Type: application/json' \\
    -d '{{"filename": "{facts["file"]}"}}'
python check.py http://127.0.0.1:8080
```

The reply must have `"n_restored": {facts["prefix_length"]}` or more. Every prompt then begins with the placeholders of
`export.json`, and goes to the restored slot:

```bash
curl http://127.0.0.1:8080/completion -H 'Content-Type: application/json' \\
    -d '{{"prompt": [PLACEHOLDERS, {prompt}], "id_slot": 0, "cache_prompt": true, "temperature": 0}}'
```

In each reply `timings.cache_n` must be {facts["prefix_length"]} or more. **Where it is less, the prefix was not in
effect:** the placeholders were read as ordinary tokens, without any error. Restore the slot again. That happens when a
request without the placeholders used the slot, and after every start of the server. `check.py` restores the slot, asks
with and without the prefix, and exits with 1 if anything is wrong.

{blob}
## When the build refuses the file

The layout changes between builds. Let yours save a slot of the placeholders, and write the prefix into that:

```bash
curl -X POST 'http://127.0.0.1:8080/slots/0?action=erase'
curl http://127.0.0.1:8080/completion -H 'Content-Type: application/json' -d @placeholders.json
curl -X POST 'http://127.0.0.1:8080/slots/0?action=save' -H 'Content-Type: application/json' \\
    -d '{{"filename": "placeholders.bin"}}'
prefixtune export PREFIX.safetensors --to llama.cpp --output . --patch slots/placeholders.bin
```
"""
