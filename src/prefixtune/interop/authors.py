"""Checkpoints of the method's authors: their MLP is run once, and the prefix kept (Li & Liang 2021, section 4.3).

For each site there are an embedding and linear layers with tanh between; a position's outcome is layer by layer, keys
before values, head by head. A directly trained prefix (their `shallow` ablation) is the one tensor `control_trans`.

    decoder   wte       control_trans        self-attention of GPT-2 or of BART's decoder
    cross     wte2      control_trans2       BART's attention to the source
    encoder   wte_enc   control_trans_enc    self-attention of BART's encoder

Knows nothing of training, and of the authors' program.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
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
from prefixtune.prefix.geometry import LayerShape, Site, describe
from prefixtune.prefix.prefix import KeyValue, Prefix, unflatten

__all__ = ["import_authors", "is_authors"]


_SUFFIXES: dict[Site, str] = {"encoder": "_enc", "decoder": "", "cross": "2"}
_NAME = re.compile(r"^(?:wte(?P<table>|2|_enc)\.weight|control_trans(?P<net>|2|_enc)(?:\.\d\.(?:weight|bias))?)$")


def is_authors(names: Collection[str]) -> bool:
    """Whether tensors of these names are a checkpoint of the authors."""
    return any(name.startswith("control_trans") for name in names)


def import_authors(path: str | Path, backbone: Backbone) -> Prefix:
    """Bake a checkpoint of the authors into a prefix, in float32.

    Args:
        path: Their state dict as a safetensors file; `wte...` and `control_trans...`.
        backbone: The model that it was trained for, which tells the layers' shapes.

    Raises:
        CheckpointError: The file is missing, broken or a pickle; tensors are missing, strange, or do not fit together;
            it is an infix; or it holds NaN or infinity.
        BackboneError: It is of other sites or sizes than the backbone's.
    """
    path = Path(path)
    tensors, _ = read_tensors(path)
    strange = sorted(name for name in tensors if not _NAME.match(name))
    if strange or not is_authors(tensors):
        raise CheckpointError(
            f"{str(path)!r} holds {', '.join(strange[:3]) or 'nothing'}, which the authors' checkpoints do not.",
            hint="give their prefix's own state dict: wte.weight, control_trans.0.weight, ...",
        )
    if backbone.kind == "decoder" and "wte2.weight" in tensors and "control_trans2.0.weight" not in tensors:
        raise CheckpointError(
            f"{str(path)!r} is an infix, whose keys and values depend on each source.", hint="train one here."
        )
    suffixes = {
        site: s for site, s in _SUFFIXES.items() if any(re.match(rf"control_trans{s}(\.|$)", n) for n in tensors)
    }
    if not suffixes.keys() <= backbone.geometry.keys():
        raise BackboneError(
            f"{str(path)!r} has prefixes at {', '.join(suffixes)}, but {backbone.name!r} has "
            f"{describe(backbone.geometry)}.",
            hint="load the backbone that it was trained for.",
        )
    layers = {site: _site(tensors, s, backbone.geometry[site], path, backbone) for site, s in suffixes.items()}
    facts: dict[str, Any] = {"reparameterization": "mlp" if "wte.weight" in tensors else "none"}
    if "control_trans.0.weight" in tensors:
        facts["bottleneck_size"] = len(tensors["control_trans.0.weight"])
    prefix = Prefix(layers, make_header(backbone, training=facts, converted={"from": "authors", "file": path.name}))
    if not prefix.is_finite():
        raise CheckpointError(f"{str(path)!r} holds NaN or infinity.", hint="get the file again.")
    return prefix


def _site(
    tensors: Mapping[str, Tensor], suffix: str, shapes: Sequence[LayerShape], path: Path, backbone: Backbone
) -> tuple[KeyValue, ...]:
    size, name = sum(shape.size for shape in shapes), f"control_trans{suffix}"
    direct = tensors.get(name)
    rows = _run(tensors, suffix, path) if direct is None else direct.float()
    if direct is not None and direct.dim() == 5:
        # As the model's cache holds it: (2 L, 1, H, P, D), keys and values by turns.
        rows = direct.float()[:, 0].permute(2, 0, 1, 3).flatten(1)
    elif direct is not None and direct.numel() % size == 0:
        rows = rows.reshape(-1, size)
    if rows.dim() != 2 or rows.shape[1] != size or not len(rows):
        raise BackboneError(
            f"{name!r} in {str(path)!r} yields {tuple(rows.shape)} numbers, but a position of {backbone.name!r} "
            f"({describe(backbone.geometry)}) has {size}.",
            hint="load the backbone that it was trained for.",
        )
    return tuple((key.contiguous(), value.contiguous()) for key, value in unflatten(rows, shapes))


@torch.no_grad()
def _run(tensors: Mapping[str, Tensor], suffix: str, path: Path) -> Float[Tensor, "P S"]:
    """The MLP's outcome."""
    numbers = sorted(
        int(match.group(1)) for n in tensors if (match := re.match(rf"control_trans{suffix}\.(\d)\.weight$", n))
    )
    names = [f"wte{suffix}.weight"]
    names += [f"control_trans{suffix}.{number}.{part}" for number in numbers for part in ("weight", "bias")]
    missing = [name for name in names if name not in tensors]
    # Between two linear layers there is one tanh, which has a number too.
    if missing or len(numbers) < 2 or numbers != list(range(0, 2 * len(numbers), 2)):
        raise CheckpointError(
            f"{str(path)!r} lacks {', '.join(missing) or f'a layer of control_trans{suffix}'}.",
            hint="get the file again.",
        )
    table, *linear = (tensors[name].float() for name in names)
    try:
        hidden = table
        for number, (weight, bias) in enumerate(zip(linear[::2], linear[1::2], strict=True)):
            hidden = functional.linear(torch.tanh(hidden) if number else hidden, weight, bias)
    except RuntimeError as error:
        raise CheckpointError(
            f"the tensors of control_trans{suffix} in {str(path)!r} do not fit together: {error}.",
            hint="get the file again.",
        ) from error
    return hidden
