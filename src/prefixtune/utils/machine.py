"""Facts about the machine: processor, versions, free memory."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_PACKAGES = ("prefixtune", "torch", "transformers", "safetensors", "sacrebleu", "peft")


def num_cores() -> int:
    """Cores that this process may use, within a container's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # "max", where there is no limit, is no number.
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        cores = max(1, min(cores, int(quota) // int(period)))
    return cores


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory and system."""
    # Building the wheel imports this module, in an environment with little more than the command line needs.
    import psutil

    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    return {
        "processor": processor,
        "cores": num_cores(),
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


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still take on a device; for the CPU, within the limit of its container."""
    import psutil

    if device.type == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch keeps of freed tensors, it uses again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = psutil.virtual_memory().available
    # Of a container, whose page cache counts as used.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        most, used, facts = (
            Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = next(line for line in facts.splitlines() if line.startswith("inactive_file ")).split()[1]
        free = min(free, max(0, int(most) - int(used) + int(cached)))
    return free
