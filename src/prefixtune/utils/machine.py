"""Facts about a measurement: the machine and the versions. Needs no library."""

from __future__ import annotations

import contextlib
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["describe_machine", "num_cores", "versions"]

_PACKAGES = ("prefixtune", "torch", "transformers", "safetensors", "sacrebleu", "peft")


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine() -> dict[str, str | int | float]:
    """Processor, cores, memory and system."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), processor)
    facts: dict[str, str | int | float] = {
        "processor": processor,
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    with contextlib.suppress(ValueError, OSError, AttributeError):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    return facts


def versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that a figure depends on."""
    installed = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            installed[name] = version(name)
    return installed
