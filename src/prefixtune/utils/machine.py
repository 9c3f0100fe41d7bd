"""Facts about a measurement: the machine, the versions, and the memory that the process took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

__all__ = ["describe_machine", "peak_memory_mib", "reset_peak_memory", "versions"]

_PACKAGES = ("prefixtune", "torch", "transformers", "safetensors", "sacrebleu", "peft")


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory and system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.machine()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a figure depends on."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed


def reset_peak_memory() -> bool:
    """Start the peak of memory again from the present size; False if the system cannot (only Linux can)."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        # Freed memory goes back to the system; otherwise it would count for the next measurement.
        ctypes.CDLL(None).malloc_trim(0)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def peak_memory_mib() -> float | None:
    """The most memory that this process has taken, in MiB, since the last `reset_peak_memory`; None: unknown.

    Main memory, not that of a GPU; it includes Python and the libraries.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**10
    return None
