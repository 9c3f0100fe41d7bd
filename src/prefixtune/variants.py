"""Backbones that are more than weights on one device: quantized, spread over devices and disk, or tuned by LoRA.

Rounding and LoRA need a library each (torchao, peft), which is imported when it is asked for. Knows nothing of
prefixes, tokenizers and training.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prefixtune.errors import BackboneError, ConfigError, did_you_mean

__all__ = ["QUANTIZATIONS", "add_adapter", "load_adapter", "quantize", "require", "weights"]

QUANTIZATIONS = ("int8", "int4")

_EXTRAS = {
    "torchao": "quantize",
    "peft": "lora",
    "ray": "ray",
    "onnx": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
}
"""The optional libraries, and the extra of this package that brings each."""

_GROUP = 32
"""Weights that share one scale under int4."""


def require(module: str, what: str) -> Any:
    """Import an optional library.

    Raises:
        ConfigError: It is not installed; says how to get it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        raise ConfigError(
            f"{what} needs {package}, which is not installed.", hint=f"pip install 'prefixtune[{_EXTRAS[package]}]'."
        ) from error


def quantize(model: Any, kind: str) -> None:
    """Round the linear layers' weights to 8 or 4 bits, in place; the output head, embeddings and activations stay.

    On the CPU torchao keeps 4-bit weights in 8-bit cells: their values are right, the memory is that of int8.

    Raises:
        ConfigError: An unknown kind, or torchao is missing.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {kind!r}.", hint=did_you_mean(kind, QUANTIZATIONS))
    ao = require("torchao.quantization", f"quantize = {kind!r}")
    if kind == "int8":
        config = ao.Int8WeightOnlyConfig()
    elif model.device.type == "cuda":
        config = ao.Int4WeightOnlyConfig(group_size=_GROUP)
    else:
        granularity = require("torchao.quantization.granularity", "quantize").PerGroup(_GROUP)
        mapping = require("torchao.quantization.quant_primitives", "quantize").MappingType.ASYMMETRIC
        four: Any = torch.int4  # type: ignore[attr-defined]
        config = ao.IntxWeightOnlyConfig(weight_dtype=four, granularity=granularity, mapping_type=mapping)
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return kind == "int8" or module.in_features % _GROUP == 0

    ao.quantize_(model, config, filter_fn=wanted)


def load_adapter(model: Any, path: str, *, trainable: bool = False) -> Any:
    """Put a LoRA adapter of PEFT into a model; its files must be safetensors and JSON.

    Returns:
        PEFT's view of the model, which can store the adapter again; the model itself now holds the adapter's layers.

    Raises:
        BackboneError: There is no such adapter, it is a pickle, it lacks weights, or it does not fit.
    """
    peft = require("peft", "adapter")
    folder = Path(path)
    if not (folder / "adapter_config.json").is_file() or not (folder / "adapter_model.safetensors").is_file():
        raise BackboneError(
            f"{path!r} holds no adapter_config.json with adapter_model.safetensors.",
            hint="give the folder that PEFT's save_pretrained wrote, with safe serialization.",
        )
    try:
        tuned = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable, local_files_only=True)
        # PEFT only warns of weights that are missing, and leaves those layers as they were.
        stored = peft.load_peft_weights(str(folder), device="cpu").keys()
        missing = sorted(key for key in peft.get_peft_model_state_dict(tuned) if "lora_" in key and key not in stored)
    except (ValueError, RuntimeError, KeyError, OSError, TypeError) as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BackboneError(f"the adapter {path!r} does not fit: {first}", hint="load its own base model.") from error
    if missing:
        raise BackboneError(
            f"the adapter {path!r} lacks {len(missing)} weights that its configuration asks for, such as {missing[0]}.",
            hint="get the whole adapter, and load its own base model.",
        )
    return tuned


def add_adapter(model: Any, rank: int, *, seed: int = 0) -> Any:
    """Put a fresh LoRA adapter on every linear layer but the output head, to be trained; it starts without effect.

    Returns:
        PEFT's view of the model, as for `load_adapter`.
    """
    peft = require("peft", "adapter_rank")
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)


def weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Every parameter by name, also those that Accelerate keeps on disk or elsewhere until they are needed."""
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta":
            yield name, parameter
            continue
        owner, _, last = name.rpartition(".")
        hook = getattr(model.get_submodule(owner), "_hf_hook", None)
        stored: Mapping[str, Tensor] | None = getattr(hook, "weights_map", None)
        if stored is None or last not in stored:
            raise BackboneError(
                f"the weight {name!r} is nowhere to be found.", hint="load the model without offloading."
            )
        yield name, stored[last]
