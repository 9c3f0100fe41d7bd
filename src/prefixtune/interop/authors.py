"""Checkpoints of the method's authors: their MLP is run once, and its result is the prefix (Li & Liang 2021, 4.3).

For each site there are an embedding and linear layers with tanh between them; a position's output is layer by layer,
keys before values, head by head. A directly trained prefix (their `shallow` ablation) is a single tensor,
`control_trans`.

    decoder   wte       control_trans        self-attention of GPT-2 or of BART's decoder
    cross     wte2      control_trans2       BART's attention to the source
    encoder   wte_enc   control_trans_enc    self-attention of BART's encoder
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.errors import BackboneError, CheckpointError
from prefixtune.interop.safetensors import read_tensors
from prefixtune.prefix.geometry import Site, describe
from prefixtune.prefix.prefix import KeyValue, Prefix, unflatten

__all__ = ["import_authors", "is_authors"]


_SUFFIXES: dict[Site, str] = {"encoder": "_enc", "decoder": "", "cross": "2"}
_NAME = re.compile(r"^(?:wte(?P<table>|2|_enc)\.weight|control_trans(?P<net>|2|_enc)(?:\.\d\.(?:weight|bias))?)$")


def is_authors(names: Collection[str]) -> bool:
    """Whether a file with tensors of these names is a checkpoint of the authors."""
    return any(name.startswith("control_trans") for name in names)


def import_authors(path: str | Path, backbone: Backbone) -> Prefix:
    """Bake a checkpoint of the authors into a prefix, in float32.

    Args:
        path: Their state dict as a safetensors file; `wte...` and `control_trans...`.
        backbone: The model that it was trained for; it determines the layers' shapes.

    Raises:
        CheckpointError: The file is missing, broken or a pickle; tensors are missing, unknown, or do not fit together;
            it is an infix; or it holds NaN or infinity.
        BackboneError: Its sites or sizes are not the backbone's.
    """
    path = Path(path)
    tensors, _ = read_tensors(path)
    unknown = sorted(name for name in tensors if not _NAME.match(name))
    if unknown or not is_authors(tensors):
        raise CheckpointError(
            f"{str(path)!r} holds {', '.join(unknown[:3]) or 'nothing'}, which the authors' checkpoints do not.",
            hint="give their prefix's own state dict: wte.weight, control_trans.0.weight, ...",
        )
    if backbone.kind == "decoder" and "wte2.weight" in tensors and "control_trans2.0.weight" not in tensors:
        raise CheckpointError(
            f"{str(path)!r} is an infix, whose keys and values depend on each source.", hint="train one here."
        )
    suffixes = {
        site: suffix
        for site, suffix in _SUFFIXES.items()
        if any(re.match(rf"control_trans{suffix}(\.|$)", name) for name in tensors)
    }
    if not suffixes.keys() <= backbone.geometry.keys():
        raise BackboneError(
            f"{str(path)!r} has prefixes at {', '.join(suffixes)}, but {backbone.name!r} has "
            f"{describe(backbone.geometry)}.",
            hint="load the backbone that it was trained for.",
        )
    layers = {site: _bake_site(tensors, suffix, site, path, backbone) for site, suffix in suffixes.items()}
    training: dict[str, Any] = {"reparameterization": "mlp" if "wte.weight" in tensors else "none"}
    if "control_trans.0.weight" in tensors:
        training["bottleneck_size"] = len(tensors["control_trans.0.weight"])
    prefix = Prefix(layers, make_header(backbone, training=training, converted={"from": "authors", "file": path.name}))
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again.")
    return prefix


def _bake_site(
    tensors: Mapping[str, Tensor], suffix: str, site: Site, path: Path, backbone: Backbone
) -> tuple[KeyValue, ...]:
    shapes, name = backbone.geometry[site], f"control_trans{suffix}"
    size = sum(shape.size for shape in shapes)
    direct = tensors.get(name)
    if direct is None:
        rows = _run_mlp(tensors, suffix, path)
    elif direct.dim() == 5:
        # As the model's cache holds it: (2 L, 1, H, P, D), keys and values by turns.
        rows = direct.float()[:, 0].permute(2, 0, 1, 3).flatten(1)
    else:
        rows = direct.float().reshape(-1, size) if direct.numel() % size == 0 else direct.float()
    if rows.dim() != 2 or rows.shape[1] != size or not len(rows):
        raise BackboneError(
            f"{name!r} in {str(path)!r} yields {tuple(rows.shape)} numbers, but a position of {backbone.name!r} "
            f"({describe(backbone.geometry)}) has {size}.",
            hint="load the backbone that it was trained for.",
        )
    return tuple((key.contiguous(), value.contiguous()) for key, value in unflatten(rows, shapes))


@torch.no_grad()
def _run_mlp(tensors: Mapping[str, Tensor], suffix: str, path: Path) -> Float[Tensor, "P S"]:
    """The MLP's output for every position."""
    pattern = re.compile(rf"control_trans{suffix}\.(\d)\.weight$")
    indices = sorted(int(match[1]) for name in tensors if (match := pattern.match(name)))
    names = [f"wte{suffix}.weight"]
    names += [f"control_trans{suffix}.{index}.{part}" for index in indices for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    # Between two linear layers there is a tanh, which has an index too.
    if missing or len(indices) < 2 or indices != list(range(0, 2 * len(indices), 2)):
        raise CheckpointError(
            f"{str(path)!r} lacks {', '.join(missing) or f'a layer of control_trans{suffix}'}.",
            hint="get the file again.",
        )
    hidden, *linear = (tensors[name].float() for name in names)
    try:
        for index, (weight, bias) in enumerate(zip(linear[::2], linear[1::2], strict=True)):
            hidden = functional.linear(torch.tanh(hidden) if index else hidden, weight, bias)
    except RuntimeError as error:
        raise CheckpointError(
            f"the tensors of control_trans{suffix} in {str(path)!r} do not fit together: {error}.",
            hint="get the file again.",
        ) from error
    return hidden
