"""What a figure depends on besides the code: the machine, the versions, and the load by other processes.

Needs no library but torch: a peer of the comparison imports it in an environment of its own.
"""

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

import torch

from prefixtune.utils.machine import describe_machine, versions

BUSY_CORES = 0.25
"""Cores used by others from which on medians of short steps move."""


def describe() -> dict[str, Any]:
    """Machine, versions and threads, for the results file."""
    return {
        "machine": {
            **describe_machine(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "bf16_instructions": _has_bf16(),
        },
        "versions": {**versions(), **{name: version(name) for name in ("numpy", "tokenizers")}},
        "threads": torch.get_num_threads(),
        "environment": {key: os.environ[key] for key in sorted(os.environ) if key.startswith(("OMP_", "MKL_", "KMP_"))},
    }


def command_line() -> str:
    """The command that runs this process, with a Python that is named without its folder."""
    return shlex.join([Path(sys.executable).name, *sys.orig_argv[1:]])


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


def resident_mib() -> float | None:
    """Resident memory of this process, in MiB; None where there is no /proc."""
    for line in _lines("/proc/self/status"):
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return None


class BackgroundLoad:
    """Cores that other processes kept busy since this object was made."""

    def __init__(self) -> None:
        self.load_average = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._began, self._busy, self._own = time.monotonic(), _busy_seconds(), _own_seconds()

    @property
    def busy_at_start(self) -> bool:
        """Whether the load average at the start suggests that other processes are working."""
        return self.load_average is not None and self.load_average > BUSY_CORES * (os.cpu_count() or 1)

    def cores(self) -> float | None:
        """Cores that others used on average; None where the system does not count them."""
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        elapsed = max(time.monotonic() - self._began, 1e-9)
        return max(0.0, (busy - self._busy) - (_own_seconds() - self._own)) / elapsed


def _has_bf16() -> bool:
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def _busy_seconds() -> float | None:
    lines = _lines("/proc/stat")
    if not lines:
        return None
    user, nice, system, _idle, _wait, irq, soft, steal = map(int, lines[0].split()[1:9])
    return (user + nice + system + irq + soft + steal) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
