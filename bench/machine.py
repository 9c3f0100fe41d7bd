"""What a figure depends on besides the code: the machine, the versions, and the load by other processes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shlex
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from prefixtune.utils.machine import describe_machine, versions

BUSY_CORES = 0.25
"""Cores used by others from which on medians of short steps move."""


def describe(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions and threads, for the results file."""
    cpu = {"cpu_capability": torch.backends.cpu.get_cpu_capability(), "bf16_instructions": _has_bf16()}
    return {
        "machine": {**describe_machine(), **cpu, **_describe_gpu(device)},
        "versions": {**versions(), **{name: version(name) for name in ("numpy", "tokenizers")}},
        "threads": torch.get_num_threads(),
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "MKL_", "KMP_"))},
    }


def _describe_gpu(device: str) -> dict[str, Any]:
    if not is_gpu(device):
        return {}
    facts = torch.cuda.get_device_properties(device)
    return {
        "gpu": facts.name,
        "gpu_memory_gib": round(facts.total_memory / 2**30, 1),
        "gpu_capability": f"{facts.major}.{facts.minor}",
        "cuda": torch.version.cuda,
    }


def is_gpu(device: str | torch.device) -> bool:
    """Whether it is a GPU that torch counts the memory of."""
    return torch.device(device).type == "cuda"


def wait(device: str | torch.device) -> None:
    """Wait until the device has computed all that it was given."""
    if is_gpu(device):
        torch.cuda.synchronize(device)


def command_line() -> str:
    """The command that runs this process, with a Python that is named without its folder."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


def reset_peak_memory(device: str | torch.device = "cpu") -> None:
    """Start the peaks of memory again from the present sizes; main memory's only where the system can (Linux)."""
    gc.collect()
    if is_gpu(device):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # Freed memory goes back to the system; otherwise it would count for the next measurement.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def memory_mib(device: str | torch.device = "cpu", *, peak: bool = False) -> float | None:
    """Memory that this process has, or the most since `reset_peak_memory`, in MiB; None: unknown.

    Args:
        device: A GPU: what torch has there for tensors. A CPU: main memory, with Python and its libraries.
        peak: The most.
    """
    if is_gpu(device):
        return (torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated)(device) / 2**20
    for line in _lines("/proc/self/status"):
        if line.startswith("VmHWM:" if peak else "VmRSS:"):
            return int(line.split()[1]) / 2**10
    return None


class BackgroundLoad:
    """Cores that other processes kept busy since this object was made."""

    def __init__(self) -> None:
        self.load_average: float = psutil.getloadavg()[0]
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    @property
    def busy_at_start(self) -> bool:
        """Whether the load average at the start suggests that other processes are working."""
        return self.load_average > BUSY_CORES * (os.cpu_count() or 1)

    def cores(self) -> float:
        """Cores that others used on average."""
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return max(0.0, (_busy_seconds() - self._busy) - (_own_seconds() - self._own)) / elapsed


def _has_bf16() -> bool:
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def _busy_seconds() -> float:
    times = psutil.cpu_times()
    return sum(getattr(times, kind, 0.0) for kind in ("user", "nice", "system", "irq", "softirq", "steal"))


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
