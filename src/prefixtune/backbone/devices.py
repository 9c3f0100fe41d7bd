"""The dtype and the device that a name means on this machine."""

from __future__ import annotations

import torch

from prefixtune.errors import ConfigError, describe_value, did_you_mean
from prefixtune.prefix.artifact import DTYPES

__all__ = ["choose_device", "choose_dtype"]


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that a name means; `auto` is bfloat16 where the hardware multiplies it faster, else float32.

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
    """The device that a name means; `auto` is CUDA when present, else Apple's MPS when present, else the CPU.

    Raises:
        ConfigError: The name is unknown, or the machine has no such device.
    """
    if device == "auto":
        available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return torch.device(next((name for name, is_available in available.items() if is_available), "cpu"))
    hint = "use cpu, cuda, cuda:0, mps or auto."
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}.", hint=hint) from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {str(device)!r}, which is not supported.", hint=hint)
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {str(device)!r}, but this machine has no CUDA.", hint="use --device cpu.")
    if chosen.type == "cuda" and chosen.index and chosen.index >= torch.cuda.device_count():
        raise ConfigError(
            f"device is {str(device)!r}, but this machine's last one is 'cuda:{torch.cuda.device_count() - 1}'.",
            hint="use --device cuda for the first one.",
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"device is {str(device)!r}, but this machine has no MPS (Apple's GPUs).",
            hint="use --device cpu.",
        )
    return chosen
