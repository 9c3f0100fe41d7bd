"""GGUF files: whether one holds a backbone's weights, whatever their quantization."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import checkpoint_folder
from prefixtune.backbone.convert import read_gguf
from prefixtune.backbone.packaged import PRETRAINED, packaged_gguf
from prefixtune.backbone.shapes import StoredWeights
from prefixtune.errors import BackboneError
from prefixtune.utils.folders import expand_home


def find_gguf(given: str, backbone: Backbone) -> tuple[Path, str]:
    """The GGUF file with a backbone's weights, and what it says of their quantization, such as `Q8_0`.

    Args:
        given: Its path; empty: the backbone itself if it is one, or that of an embedded backbone.
        backbone: Its shapes, by `load_shapes`.

    Raises:
        BackboneError: There is none, or it cannot be read, or it holds another model: its norms are not the backbone's.
    """
    own = backbone.name if backbone.name.endswith(".gguf") else ""
    path = expand_home(given) if given else Path(own) if own else packaged_gguf(backbone.name)
    if path is None:
        hint = "run `prefixtune prepare --force`." if backbone.name in PRETRAINED else "name the file with --gguf FILE."
        raise BackboneError(f"llama.cpp needs {backbone.name!r} as a GGUF file.", hint=hint)
    import gguf

    try:
        reader = read_gguf(path)
        tensors = {one.name: one for one in reader.tensors}
        stored = StoredWeights(checkpoint_folder(backbone.name))
        wrong = _other_weights(reader.fields["general.architecture"].contents(), tensors, backbone, stored)
        number = reader.fields.get("general.file_type")
        quantization = "" if number is None else gguf.LlamaFileType(number.contents()).name.removeprefix("MOSTLY_")
    except (OSError, ValueError, KeyError, IndexError, NotImplementedError) as error:
        raise BackboneError(f"{str(path)!r} is no GGUF file of a language model: {error}", hint="check it.") from error
    if wrong:
        what = f"{str(path)!r} holds another model than {backbone.name!r}: {wrong}."
        raise BackboneError(what, hint="convert the backbone's own folder to GGUF by llama.cpp's converter.")
    return path, quantization


def _other_weights(kind: str, tensors: Mapping[str, Any], backbone: Backbone, stored: StoredWeights) -> str:
    """What tells a file's weights from the backbone's: a norm, which no file rounds; empty: nothing."""
    import gguf

    architecture = {known: one for one, known in gguf.MODEL_ARCH_NAMES.items()}[kind]
    names = gguf.get_tensor_name_map(architecture, len(backbone.geometry["decoder"]))
    for name in (name for name, _ in backbone.model.named_parameters() if "norm" in name or "ln_" in name):
        other = tensors.get(names.get_name(name, (".weight", ".bias")) or "")
        if other is None:
            return f"it has no {name}"
        vector, theirs = stored.row(name, 0), torch.tensor(other.data).float()
        rounding = max(torch.finfo(vector.dtype).eps, torch.finfo(torch.float16).eps)
        if theirs.shape != vector.shape or not torch.allclose(theirs, vector.float(), rtol=rounding, atol=1e-6):
            return f"{other.name} is another (the model may have been trained further)"
    return ""
