"""Load a backbone: the model and its tokenizer, on a device, quantized or with a LoRA adapter."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.checkpoint import find_checkpoint, no_config_error, read_checkpoint
from prefixtune.backbone.devices import choose_device, choose_dtype
from prefixtune.backbone.lora import (
    adapter_config,
    add_adapter,
    base_model_name,
    check_adapter_files,
    check_lora,
    import_peft,
    is_adapter,
    load_adapter,
)
from prefixtune.backbone.packaged import DEFAULT as DEFAULT_BACKBONE
from prefixtune.backbone.quantization import QUANTIZATIONS
from prefixtune.backbone.quantization import quantize as quantize_weights
from prefixtune.backbone.quiet import quiet_transformers
from prefixtune.errors import BackboneError, ConfigError, describe_value, did_you_mean
from prefixtune.utils.extras import needs_extra

__all__ = [
    "DEFAULT_BACKBONE",
    "BackboneLike",
    "as_backbone",
    "check_loadable",
    "load_backbone",
]


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
    if isinstance(given, torch.nn.Module):
        raise ConfigError(
            f"the backbone is {describe_value(given)}, a model without its tokenizer.",
            hint="give the pair (model, tokenizer).",
        )
    pair = tuple(given) if isinstance(given, tuple | list) else ()
    if len(pair) == 2 and isinstance(pair[0], torch.nn.Module) and callable(pair[1]) and hasattr(pair[1], "decode"):
        model, tokenizer = pair
        config = getattr(model, "config", None)
        name = str(getattr(config, "name_or_path", "") or getattr(config, "model_type", "") or type(model).__name__)
        return check_end_token(Backbone.from_model(model, tokenizer, name))
    shown = f"a {type(given).__name__} of {', '.join(type(one).__name__ for one in pair)}" if pair else None
    raise ConfigError(
        f"the backbone is {shown or describe_value(given)}, but must be a name, a path, a Backbone or a pair "
        "(model, tokenizer) of transformers.",
        hint='give load_backbone("smollm2-135m"), say, or (model, tokenizer) in this order.',
    )


def load_backbone(
    name_or_path: BackboneLike = DEFAULT_BACKBONE,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "auto",
    quantize: str = "",
    device_map: str | dict[str, Any] | None = None,
    offload_folder: str | None = None,
    adapter: str | os.PathLike[str] | None = None,
    train_adapter: bool = False,
    adapter_rank: int = 0,
    attention: str = "sdpa",
    seed: int = 0,
) -> Backbone:
    """Load a frozen language model: decoder-only, encoder-decoder, or a text encoder.

    Args:
        name_or_path: `smollm2-135m` (embedded; run `prefixtune prepare` once), a hub id, a local folder in
            transformers' format, a `.gguf` file, or the folder of a LoRA adapter (PEFT): its base model is loaded, and
            the adapter added to it. Also a (model, tokenizer) pair of transformers, used as it is: without other
            options.
        dtype: A torch dtype or its name; `auto`: bfloat16 where the hardware is fast at it, else float32.
        device: `cpu`, `cuda`, `mps` or `auto`. MPS was never measured.
        quantize: `int8` or `int4`: round the weights of linear layers (torchao). The fingerprint is that of the weights
            before rounding.
        device_map: Spread the model over devices, memory and disk (Accelerate): `auto`, or module -> device; instead of
            `device`.
        offload_folder: Holds the weights that `device_map` puts on disk.
        adapter: Folder of a LoRA adapter (PEFT) to add to the model; its weights count as the backbone's.
        train_adapter: Leave the adapter trainable, to be trained together with a prefix.
        adapter_rank: Add a new LoRA adapter of this rank to the model, to be trained together with a prefix; 0: none.
        attention: What computes the attention once the prefix is in front: `sdpa` (torch's fused functions), `flex`
            (torch's flex_attention) or `eager` (matrix products, to compare with).
        seed: Of a new adapter's weights.

    Raises:
        BackboneError: There is no such model, its checkpoint lacks weights, or it cannot have a prefix; the message
            says why.
        CheckpointError: The adapter's configuration cannot be read.
        ConfigError: An unknown dtype or device, something that is not a backbone, or options that cannot be combined.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        usual = (dtype, str(device)) == ("float32", "auto") and attention == "sdpa"
        if not usual or quantize or device_map or adapter or train_adapter or adapter_rank:
            raise ConfigError(
                f"the backbone is {describe_value(name_or_path)}, which is used as it is, but options were given too.",
                hint="give a name or path with them, or set dtype and device on the model itself.",
            )
        return as_backbone(name_or_path)
    name = os.fspath(name_or_path)
    target_device = choose_device(device)
    target_dtype = choose_dtype(dtype, target_device)
    source, options, adapter = _resolve(name, quantize, adapter, adapter_rank, train_adapter=train_adapter)
    spread = {} if device_map is None else {"device_map": device_map, "offload_folder": offload_folder}
    if quantize and (device_map is not None or adapter is not None or adapter_rank):
        raise ConfigError(
            f"quantize = {quantize!r} cannot be combined with device_map or an adapter.", hint="leave one of them out."
        )
    model, tokenizer, unused = read_checkpoint(name, source, options, target_dtype, spread)
    model = model if spread else model.to(target_device)
    peft_model = None
    with quiet_transformers():
        if adapter is not None:
            peft_model = load_adapter(model, str(adapter), trainable=train_adapter)
        elif adapter_rank:
            peft_model = add_adapter(model, adapter_rank, seed=seed)
    backbone = Backbone.from_model(
        model,
        tokenizer,
        name,
        adapter=peft_model,
        train_adapter=train_adapter or adapter_rank > 0,
        attention=attention,
    )
    if quantize:
        with quiet_transformers():
            quantize_weights(model, quantize)
    return check_end_token(replace(backbone, unused_weights=unused))


def check_loadable(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "",
    adapter: str | None = None,
    train_adapter: bool = False,
    adapter_rank: int = 0,
) -> None:
    """Check what can be checked at once, before other work and before loading; arguments as for `load_backbone`.

    Raises:
        PrefixError: As `load_backbone` does; a name on the hub is not looked up.
    """
    choose_dtype(dtype, choose_device(device))
    source, options, _ = _resolve(name, quantize, adapter, adapter_rank, train_adapter=train_adapter)
    if Path(source).is_dir() and "gguf_file" not in options and not (Path(source) / "config.json").is_file():
        raise no_config_error(name, "the folder has no config.json.")


def _resolve(
    name: str, quantize: str, adapter: str | os.PathLike[str] | None, adapter_rank: int, *, train_adapter: bool
) -> tuple[str, dict[str, Any], str | os.PathLike[str] | None]:
    """Where a backbone is, the options to load it with, and its adapter.

    Raises:
        PrefixError: There is no such backbone or adapter, none to train, or a library that it needs is missing.
    """
    base = name
    if is_adapter(Path(name)):
        if adapter is not None:
            raise ConfigError(
                f"{name!r} is a LoRA adapter itself, but adapter = {str(adapter)!r} names another one.",
                hint="merge one of them into its base model first.",
            )
        base, adapter = base_model_name(Path(name)), name
    if adapter is not None and adapter_rank:
        raise ConfigError(
            f"adapter = {str(adapter)!r} and adapter_rank = {adapter_rank}, but a backbone has one adapter, a stored "
            "or a new one.",
            hint="leave adapter_rank out; train_adapter trains the stored adapter further.",
        )
    if adapter is not None:
        if Path(adapter).is_dir():
            adapter_config(adapter)
        check_lora(Path(adapter))
        check_adapter_files(Path(adapter))
    if train_adapter and adapter is None and not adapter_rank:
        raise ConfigError(
            "train_adapter is True, but there is no adapter.",
            hint="name one (adapter, --adapter FOLDER), or train a new one (adapter_rank, --adapter-rank 8).",
        )
    if quantize and quantize not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {quantize!r}.", hint=did_you_mean(quantize, QUANTIZATIONS))
    if quantize:
        with needs_extra("quantize", f"quantize = {quantize!r}"), quiet_transformers():
            import torchao  # noqa: F401
    if adapter is not None or adapter_rank:
        import_peft()
    source, options = find_checkpoint(base)
    return source, options, adapter


def check_end_token(backbone: Backbone) -> Backbone:
    """Return the same backbone, if its tokenizer has a token that ends a target.

    Raises:
        BackboneError: It has none.
    """
    if backbone.kind != "encoder" and backbone.tokenizer.eos_token_id is None:
        raise BackboneError(
            f"the tokenizer of {backbone.name!r} has no end-of-sequence token, which ends every target.",
            hint="set eos_token in its tokenizer_config.json.",
        )
    return backbone
