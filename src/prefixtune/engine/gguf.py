"""GGUF files: whether one holds a backbone's weights, whatever their quantization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import find_checkpoint
from prefixtune.backbone.packaged import PRETRAINED, packaged_gguf
from prefixtune.backbone.shapes import StoredWeights
from prefixtune.errors import BackboneError

__all__ = ["check_gguf", "find_gguf"]


_ROWS = 64
_LEAST_CORRELATION = 0.95
"""Of embeddings; four bits leave 0.99, and those of another model have none."""


def find_gguf(given: str, backbone: Backbone) -> tuple[Path, str]:
    """The GGUF file with a backbone's weights, and its quantization.

    Args:
        given: Its path; empty: that of an embedded backbone.
        backbone: Its shapes, by `load_shapes`.

    Raises:
        BackboneError: There is none, or it holds another model.
    """
    path = Path(given) if given else packaged_gguf(backbone.name)
    if path is None:
        hint = "run `prefixtune prepare --force`." if backbone.name in PRETRAINED else "name the file with --gguf FILE."
        raise BackboneError(f"llama.cpp needs {backbone.name!r} as a GGUF file.", hint=hint)
    return path, check_gguf(path, backbone, Path(find_checkpoint(backbone.name)[0]))


def check_gguf(path: Path, backbone: Backbone, folder: Path) -> str:
    """Refuse a GGUF file of another model.

    Args:
        path: The file.
        backbone: The model's shapes.
        folder: The backbone's checkpoint.

    Returns:
        What the file says of its quantization, such as `Q8_0`.

    Raises:
        BackboneError: It cannot be read; its shapes are others; its embeddings are not the backbone's.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        field: dict[str, Any] = {
            name: reader.fields[name].contents() for name in reader.fields if "tokenizer" not in name
        }
        kind = field["general.architecture"]
        found = {
            "layers": field[f"{kind}.block_count"],
            "width": field[f"{kind}.embedding_length"],
            "KV heads": field.get(f"{kind}.attention.head_count_kv", field[f"{kind}.attention.head_count"]),
        }
        embeddings = next(tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    except (OSError, ValueError, KeyError, StopIteration, IndexError) as error:
        raise BackboneError(f"{str(path)!r} is no GGUF file of a language model: {error}", hint="check it.") from error
    layers = backbone.geometry["decoder"]
    wanted = {"layers": len(layers), "width": backbone.hidden_size, "KV heads": layers[0].num_kv_heads}
    wrong = [f"{name} {found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value]
    stored, model = StoredWeights(folder), backbone.model
    own = model.get_input_embeddings().weight
    name = next(name for name, parameter in model.named_parameters() if parameter is own)
    if not wrong:
        places = [index * len(embeddings.data) // _ROWS for index in range(_ROWS)]
        theirs = torch.from_numpy(gguf.quants.dequantize(embeddings.data[places], embeddings.tensor_type)).flatten()
        ours = torch.cat([stored.row(name, place).float() for place in places])
        if theirs.shape != ours.shape or torch.corrcoef(torch.stack([theirs, ours]))[0, 1] < _LEAST_CORRELATION:
            wrong = ["its embeddings are others"]
    if wrong:
        raise BackboneError(
            f"{str(path)!r} holds another model than {backbone.name!r}: {'; '.join(wrong)}.",
            hint="convert the backbone's own folder to GGUF by llama.cpp's converter.",
        )
    return (
        gguf.LlamaFileType(field["general.file_type"]).name.removeprefix("MOSTLY_")
        if "general.file_type" in field
        else ""
    )
