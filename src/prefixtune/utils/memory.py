"""How much memory a process may still take."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import torch

__all__ = ["free_memory"]


def free_memory(device: torch.device) -> int:
    """Bytes that a process may still take; on a CPU without the system's own word for it, half of the machine's."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info(device)[0]
        # What torch keeps of freed tensors, it uses again.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [2**63]
    with contextlib.suppress(OSError, ValueError, AttributeError):
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2)
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits[1:] = [int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024]
    # Of a container, whose page cache counts as used.
    with contextlib.suppress(OSError, ValueError, StopIteration):
        most, used, facts = (
            Path("/sys/fs/cgroup", name).read_text(encoding="ascii")
            for name in ("memory.max", "memory.current", "memory.stat")
        )
        cached = next(line for line in facts.splitlines() if line.startswith("inactive_file ")).split()[1]
        limits.append(max(0, int(most) - int(used) + int(cached)))
    return min(limits)
