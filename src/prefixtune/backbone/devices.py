"""The dtype and the device that a name means on this machine."""

from __future__ import annotations

import torch

from prefixtune.errors import ConfigError, describe_value, did_you_mean
from prefixtune.prefix.prefix import DTYPES

__all__ = ["choose_device", "choose_dtype"]

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
        shown = repr(dtype) if isinstance(dtype, str) else describe_value(dtype)
        raise ConfigError(f"unknown dtype {shown}.", hint=did_you_mean(str(dtype), [*DTYPES, "auto"]))
    return DTYPES[dtype]


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
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"unknown device {device!r}.", hint="use cpu, cuda, cuda:0, mps or auto.") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(f"device is {str(device)!r}, which is not supported.", hint="use cpu, cuda, mps or auto.")
    count = {"cpu": 1, "cuda": torch.cuda.device_count() if cuda else 0, "mps": int(mps)}[chosen.type]
    if (chosen.index or 0) >= count and chosen.type != "cpu":
        has = f"devices 0 to {count - 1}" if count else f"no {chosen.type.upper()}"
        raise ConfigError(f"device is {str(device)!r}, but this machine has {has}.", hint="use --device auto.")
    return chosen
