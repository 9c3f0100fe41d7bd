"""PEFT's prefix adapters, read and written: `adapter_config.json` and `adapter_model.safetensors` in a folder.

PEFT stores one tensor, `prompt_embeddings` of shape (P, L * 2 * H * D): a row per position, layer by layer, keys before
values. These are the rows of `prefix.flatten`, so nothing is computed, and a prefix that is exported and imported again
is the same bit for bit. PEFT runs an MLP (`prefix_projection`) once when it saves, and stores the result.
`PREFIX_TUNING` and `CARTRIDGE` differ only in that the latter says how many first positions PEFT does not train.

In PEFT, too, the text starts at position P. PEFT itself need not be installed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.lora import ADAPTER_CONFIG, adapter_config
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.errors import BackboneError, CheckpointError, ConfigError, PrefixError, did_you_mean, short_repr
from prefixtune.prefix.file import read_file
from prefixtune.prefix.geometry import LayerShape, describe
from prefixtune.prefix.header import backbone_origin, parse_header
from prefixtune.prefix.hub import HUB_NAMES
from prefixtune.prefix.prefix import READABLE, Prefix, flatten, unflatten
from prefixtune.utils.files import atomic_files

PEFT_TYPES = ("PREFIX_TUNING", "CARTRIDGE")

_WEIGHTS, _PICKLE, _TENSOR = "adapter_model.safetensors", "adapter_model.bin", "prompt_embeddings"
_HEADER = "prefixtune_header"
"""The key of our own header in the tensors' metadata, which PEFT ignores."""

_SIZES = ("num_virtual_tokens", "num_layers", "num_attention_heads", "token_dim")


# --- import ----------------------------------------------------------------------------------------------------------


def import_peft(folder: str | Path, backbone: Backbone | None = None) -> Prefix:
    """Read a prefix that PEFT saved, or that `export_peft` wrote.

    Its header holds the base model and the text format: PEFT puts nothing around a text. A prefix from `export_peft`
    keeps its own header.

    Args:
        folder: Written by PEFT's `save_pretrained`.
        backbone: Also check that the prefix fits this model, and put the model into the header.

    Raises:
        CheckpointError: A file is missing, broken or a pickle; the adapter is of another type or task, its shapes
            disagree, or it holds NaN or infinity.
        BackboneError: It does not fit the backbone.
    """
    folder = Path(folder)
    config = adapter_config(folder)
    _check_type(config, folder)
    flat, stored_header = _read_rows(folder)
    shapes = _read_shapes(config, flat, folder)
    prefix = Prefix({"decoder": tuple((k.contiguous(), v.contiguous()) for k, v in unflatten(flat, shapes))})
    if not prefix.is_finite():
        raise CheckpointError(f"{str(folder)!r} holds NaN or infinity.", hint="get it again, or train it again.")
    header: dict[str, Any] = stored_header or {
        "backbone": {"name": str(config.get("base_model_name_or_path") or ""), "kind": "decoder"},
        "text_format": {"prompt": "{source}", "target": "{target}"},
    }
    if backbone is not None:
        _check_backbone(prefix, header, backbone)
        header |= make_header(backbone)
    origin = {name: config[name] for name in ("peft_type", "num_frozen_tokens") if name in config}
    return Prefix(prefix.layers, {**header, "peft": origin})


def _check_type(config: Mapping[str, Any], folder: Path) -> None:
    """Refuse an adapter that is not a prefix, or not one for a decoder-only model."""
    peft_type, task = config.get("peft_type"), config.get("task_type")
    if peft_type not in PEFT_TYPES:
        hint = "only adapters that are keys and values of every layer are prefixes."
        if peft_type == "LORA":
            hint = f"it is part of a backbone: load_backbone({str(folder)!r}), or --backbone {folder}."
        what = f"{str(folder)!r} is an adapter of type {peft_type!r}, not {' or '.join(PEFT_TYPES)}."
        raise CheckpointError(what, hint=hint)
    # Of an encoder-decoder, PEFT shifts the decoder's text by P positions, or biases the prefix by its distance.
    if task not in (None, "CAUSAL_LM") or config.get("num_transformer_submodules") == 2:
        what = f"{str(folder)!r} is for the task {task!r}; only prefixes of CAUSAL_LM are the same numbers here."
        raise CheckpointError(what, hint="train it here, at all sites: `prefixtune train --backbone NAME`.")


def _read_rows(folder: Path) -> tuple[Tensor, dict[str, Any]]:
    """The tensor, and our own header where the file has one."""
    if not (folder / _WEIGHTS).is_file() and (folder / _PICKLE).is_file():
        raise CheckpointError(
            f"{str(folder)!r} holds its tensors as {_PICKLE}, a pickle, which could run code; only {_WEIGHTS} is read.",
            hint="load it with PEFT, if you trust its source, and save it again with safe_serialization=True.",
        )
    tensors, metadata = read_file(folder / _WEIGHTS)
    if _TENSOR not in tensors or len(tensors) > 1:
        what = f"{str(folder / _WEIGHTS)!r} holds {', '.join(sorted(tensors)[:4]) or 'nothing'}, not {_TENSOR!r} alone."
        raise CheckpointError(what, hint="modules_to_save and other adapters' weights are not part of a prefix.")
    try:
        header = parse_header(metadata.get(_HEADER, "{}"))
    except ValueError:
        header = {}
    return tensors[_TENSOR], header


def _read_shapes(config: Mapping[str, Any], flat: Tensor, folder: Path) -> tuple[LayerShape, ...]:
    """The shapes of the layers by the configuration, which must agree with the tensor."""
    sizes = {name: config.get(name) for name in (*_SIZES, "num_frozen_tokens") if name in config}
    try:
        positions, layers, heads, width = (int(config[name]) for name in _SIZES)
        fits = (
            min(positions, layers, heads) > 0 and width % heads == 0 and flat.shape == (positions, layers * 2 * width)
        )
        fits &= flat.dtype in READABLE and 0 <= int(config.get("num_frozen_tokens", 0)) <= positions
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError):
        fits = False
    if not fits:
        what = f"{_TENSOR} in {str(folder)!r}, {tuple(flat.shape)} of {flat.dtype}, does not fit {short_repr(sizes)}."
        raise CheckpointError(what, hint="save the adapter again with PEFT.")
    return (LayerShape(heads, width // heads, width // heads),) * layers


def _check_backbone(prefix: Prefix, header: Mapping[str, Any], backbone: Backbone) -> None:
    """Refuse a prefix of another model, and a model in which PEFT would put the prefix into other layers."""
    if backbone.kind != "decoder":
        what = f"{backbone.name!r} is of kind {backbone.kind!r}; PEFT's prefixes are for decoder-only models here."
        raise BackboneError(what, hint="load the model that the adapter's configuration names.")
    load_prefix(Prefix(prefix.layers, header), backbone)
    count = len(prefix.layers["decoder"])
    num_hidden_layers = getattr(backbone.model.config.get_text_config(decoder=True), "num_hidden_layers", count)
    if backbone.layout.cache_layers != tuple(range(count)) or count != num_hidden_layers:
        what = f"not every layer of {backbone.name!r} keeps keys and values of its own: PEFT would mix up the layers."
        raise BackboneError(what, hint="prefixes for such models can only be used in prefixtune.")


# --- export ----------------------------------------------------------------------------------------------------------


def export_peft(
    prefix: Prefix,
    folder: str | Path,
    backbone: Backbone | None = None,
    *,
    peft_type: str | None = None,
    num_frozen_tokens: int | None = None,
) -> Path:
    """Write a prefix as PEFT would have saved it; `PeftModel.from_pretrained(model, folder)` loads it.

    Args:
        prefix: Of a decoder-only model.
        folder: Made where it is missing; its two files are replaced.
        backbone: Also check that the prefix is for this model, and that PEFT puts it into the right layers; and put the
            model into the header.
        peft_type: `PREFIX_TUNING` or `CARTRIDGE`; None: the type it was imported from, or else `PREFIX_TUNING`.
        num_frozen_tokens: For `CARTRIDGE`: first positions that PEFT does not train; None: as imported, or else 1.

    Raises:
        ConfigError: PEFT's format cannot hold the prefix, or an option is wrong.
        CheckpointError: It holds NaN or infinity.
        BackboneError: It is not for the backbone.
        PrefixError: A file cannot be written.
    """
    folder = Path(folder)
    check_adapter_folder(folder)
    shape = _only_shape(prefix)
    if not prefix.is_finite():
        raise CheckpointError(f"the prefix for {str(folder)!r} holds NaN or infinity.", hint="train it again.")
    header = dict(prefix.header)
    if backbone is not None:
        _check_backbone(prefix, header, backbone)
        header |= make_header(backbone)
    config = _make_config(prefix, shape, header.pop("peft", {}), header, peft_type, num_frozen_tokens)
    rows = flatten(prefix.layers["decoder"]).detach().to("cpu").contiguous()
    metadata = {"format": "pt", **({_HEADER: json.dumps(header, ensure_ascii=False)} if header else {})}
    with atomic_files(folder) as temporary:
        save_file({_TENSOR: rows}, temporary / _WEIGHTS, metadata)
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (temporary / ADAPTER_CONFIG).write_text(text, encoding="utf-8")
    return folder


def check_adapter_folder(folder: str | Path) -> None:
    """Refuse a folder in which an adapter would replace another kind of adapter, or stand beside a model.

    Raises:
        ConfigError: It holds a model, or an adapter that is no prefix.
    """
    other = ""
    if os.path.exists(Path(folder) / "config.json"):  # Path.exists raises where the folder may not be read
        other = "a model"
    elif os.path.exists(Path(folder) / ADAPTER_CONFIG):
        with contextlib.suppress(PrefixError):
            other = str(adapter_config(Path(folder)).get("peft_type"))
        other = "" if other in PEFT_TYPES else f"another adapter {other}"
    if other:
        raise ConfigError(f"{str(folder)!r} holds {other}.", hint="name a folder of its own.")


def _make_config(
    prefix: Prefix,
    shape: LayerShape,
    origin: Mapping[str, Any],
    header: Mapping[str, Any],
    peft_type: str | None,
    frozen: int | None,
) -> dict[str, Any]:
    """What `adapter_config.json` holds; the origin is what an import noted in the header."""
    peft_type = peft_type or origin.get("peft_type", PEFT_TYPES[0])
    if peft_type not in PEFT_TYPES:
        raise ConfigError(f"unknown peft_type {peft_type!r}.", hint=did_you_mean(str(peft_type), PEFT_TYPES))
    length, name = prefix.length(), backbone_origin(header).name
    config: dict[str, Any] = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": HUB_NAMES.get(name, name) or None,
        "inference_mode": True,
        "num_virtual_tokens": length,
        "num_layers": len(prefix.layers["decoder"]),
        "num_attention_heads": shape.num_kv_heads,
        "token_dim": shape.num_kv_heads * shape.key_dim,
        "num_transformer_submodules": 1,
    }
    if peft_type == "CARTRIDGE":
        # It may have been cut since it was read.
        frozen = min(origin.get("num_frozen_tokens", 1), length) if frozen is None else frozen
        config["num_frozen_tokens"] = frozen
    else:
        config |= {"prefix_projection": False, "encoder_hidden_size": config["token_dim"]}
    if type(frozen or 0) is not int or not 0 <= (frozen or 0) <= (length if peft_type == "CARTRIDGE" else 0):
        what = f"num_frozen_tokens is {short_repr(frozen)}; a CARTRIDGE takes 0 to {length}, other types none."
        raise ConfigError(what, hint="1 keeps the first position, which models attend to by default.")
    return config


def _only_shape(prefix: Prefix) -> LayerShape:
    """The one shape of all layers.

    Raises:
        ConfigError: PEFT's format cannot hold the prefix.
    """
    shapes = set(prefix.geometry.get("decoder", ()))
    dtypes = {tensor.dtype for tensor in prefix.tensors()}
    faults = {
        "it is not for a decoder-only model": backbone_origin(prefix.header).kind != "decoder"
        or prefix.sites != ("decoder",),
        "it has a head for labels": prefix.head is not None,
        "it was trained together with a LoRA adapter, and needs it": bool(prefix.header.get("adapter")),
        f"its layers differ ({describe(prefix.geometry)})": len(shapes) > 1
        or len(dtypes) > 1
        or any(shape.key_dim != shape.value_dim for shape in shapes),
    }
    for fault, applies in faults.items():
        if applies:
            raise ConfigError(f"PEFT's format cannot hold this prefix: {fault}.", hint="keep prefixtune's own file.")
    return shapes.pop()
