"""Where a backbone is and in what precision: its device, its dtype, and weights rounded to 8 or 4 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prefixtune.errors import BackboneError, ConfigError, did_you_mean, short_repr
from prefixtune.prefix.prefix import DTYPES
from prefixtune.utils.extras import needs_extra
from prefixtune.utils.machine import free_memory

BFLOAT16_FEATURES = ("avx512_bf16", "amx_bf16", "sve_bf16")
"""Features of processors that multiply bfloat16 faster than float32."""


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name means; `auto` is bfloat16 where the hardware multiplies it, else float32.

    Where a GPU only emulates bfloat16 (T4, V100), float16 would be quick, but many models leave its range: it must be
    asked for.

    Raises:
        ConfigError: The name is unknown.
    """
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if _multiplies_bfloat16(device) else torch.float32
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {short_repr(dtype)}.", hint=did_you_mean(str(dtype), [*DTYPES, "auto"]))
    return DTYPES[dtype]


def check_memory(name: str, needed: int) -> None:
    """Refuse a model whose weights take more bytes than the processor's memory has left.

    Raises:
        BackboneError: They do.
    """
    free = free_memory(torch.device("cpu"))
    if needed > free:
        what = f"the weights of {name!r} need {needed / 2**30:.2f} GiB of memory; {free / 2**30:.2f} GiB are available."
        raise BackboneError(what, hint="free memory, use --dtype bfloat16 or a smaller model.")


def _multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products of bfloat16; emulation is slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(features.get(name, False) for name in BFLOAT16_FEATURES)


def choose_device(device: str | torch.device) -> torch.device:
    """The device that a name means; `auto` is CUDA when present, else Apple's MPS when present, else the CPU.

    Raises:
        ConfigError: The name is unknown, or the machine has no such device.
    """
    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    count = {"cuda": cuda, "mps": int(torch.backends.mps.is_available()), "cpu": 1}
    if device == "auto":
        return torch.device(next(kind for kind in count if count[kind]))
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}.", hint="use cpu, cuda, cuda:0, mps or auto.") from error
    if chosen.type != "cpu" and (chosen.index or 0) >= count.get(chosen.type, 0):
        has = ", ".join(f"{number} of {kind}" for kind, number in count.items())
        raise ConfigError(f"device is {str(device)!r}, but there are {has} here.", hint="use --device auto.")
    return chosen


QUANTIZATIONS = ("int8", "int4")

_GROUP = 32
"""Weights that share one scale under int4."""


def check_quantization(kind: str) -> None:
    """Refuse a quantization that is not known or not possible here.

    Raises:
        ConfigError: An unknown kind, or torchao is missing.
    """
    if kind not in QUANTIZATIONS:
        raise ConfigError(f"unknown quantization {kind!r}.", hint=did_you_mean(str(kind), QUANTIZATIONS))
    with needs_extra("quantize", f"quantize = {kind!r}"):
        import torchao  # noqa: F401


def quantize(model: Any, kind: str, device: torch.device) -> None:
    """Round the linear layers' weights to 8 or 4 bits, in place; the output head, embeddings and activations stay.

    Each layer moves to the device when it is rounded, which therefore never holds the whole model. On the CPU torchao
    keeps 4-bit weights in 8-bit cells: their values are right, the memory is that of int8.

    Args:
        model: On the CPU, where its weights are mapped from their file.
        kind: `int8` or `int4`.
        device: Where the model is to be.

    Raises:
        ConfigError: It cannot be rounded so there.
    """
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    if kind == "int8":
        config = ao.Int8WeightOnlyConfig()
    elif device.type == "cuda":
        if model.dtype != torch.bfloat16:
            raise ConfigError("int4 on a GPU takes weights in bfloat16.", hint="use --dtype bfloat16, or int8.")
        # torch's own kernels; the default format needs a further package.
        config = ao.Int4WeightOnlyConfig(group_size=_GROUP, int4_packing_format="tile_packed_to_4d")
    else:
        four: Any = torch.int4  # type: ignore[attr-defined]
        config = ao.IntxWeightOnlyConfig(
            weight_dtype=four, granularity=PerGroup(_GROUP), mapping_type=MappingType.ASYMMETRIC
        )
    head = getattr(model, "get_output_embeddings", lambda: None)()

    def wanted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module is head:
            return False
        return kind == "int8" or module.in_features % _GROUP == 0

    ao.quantize_(model, config, filter_fn=wanted, device=device)
    model.to(device)


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` has rounded some of a model's weights."""
    return any(map(is_rounded, model.parameters()))


def is_rounded(weight: Any) -> bool:
    """Whether torchao has rounded a weight."""
    return type(weight).__module__.partition(".")[0] == "torchao"
