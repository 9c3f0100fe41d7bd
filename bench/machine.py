"""What a figure depends on besides the code: the machine, the versions, and who else is at work.

Knows nothing of what is measured.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "prefixtune", "tokenizers", "numpy")

# One core's quarter in use by others already moves medians of short steps.
BUSY_CORES = 0.25


def describe() -> dict[str, Any]:
    """Machine, versions and threads, for the results file."""
    return {
        "machine": {
            "cpu": _cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "memory_gib": _memory_gib(),
            "system": f"{platform.system()} {platform.machine()}",
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": _has_bf16(),
        },
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "threads": torch.get_num_threads(),
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "MKL_", "KMP_"))},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # An uninstalled source tree, put on the path by hand.
        return str(getattr(sys.modules.get(package), "__version__", "")) or None


def _cpu_model() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "unknown"


def _memory_gib() -> float | None:
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemTotal"):
            return round(int(line.split()[1]) / 2**20, 1)
    return None


def _has_bf16() -> bool:
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


# --- memory ----------------------------------------------------------------------------------------------------------


def status_mib(name: str) -> float | None:
    """A size of this process from /proc, such as `VmRSS` (now) or `VmHWM` (its peak); None where there is no /proc."""
    for line in _lines("/proc/self/status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return None


def peak_mib() -> float:
    """Peak resident memory of this process.

    `VmHWM`, not `getrusage`: Linux hands a parent's peak down into `ru_maxrss` of the program that it starts.
    """
    peak = status_mib("VmHWM")
    if peak is not None:
        return peak
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def reset_peak_memory() -> bool:
    """Let the peak start again from the present size; False where the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


# --- who else is at work ---------------------------------------------------------------------------------------------


class Neighbours:
    """How many cores other processes kept busy since this object was made."""

    def __init__(self) -> None:
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self.began, self.busy, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    @property
    def busy_at_start(self) -> bool:
        """Whether the load average at the start suggests that others are at work."""
        return self.load is not None and self.load > BUSY_CORES * (os.cpu_count() or 1)

    def cores(self) -> float | None:
        """Cores that others used on average."""
        busy = _busy_seconds()
        if busy is None or self.busy is None:
            return None
        elapsed = max(time.monotonic() - self.began, 1e-9)
        return max(0.0, (busy - self.busy) - (_own_seconds() - self.own)) / elapsed


def _busy_seconds() -> float | None:
    lines = _lines("/proc/stat")
    if not lines:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, lines[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
