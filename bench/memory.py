"""Peak memory of some training steps of one variant, in a process of its own: reads a job from stdin, writes JSON.

Run by `bench/run.py`; nothing else is loaded here, so that the peak belongs to the variant.
"""

from __future__ import annotations

import gc
import json
import sys

import machine
import torch
from data import from_lists
from sides import make_side, step


@torch.no_grad()
def touch(model: torch.nn.Module) -> None:
    """Read something of every page, since weights may be mapped from their file and not be in memory yet."""
    for parameter in model.parameters():
        parameter.flatten()[:: 2048 // parameter.element_size()].sum()


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    batches = from_lists(job["batches"])
    side = make_side(job["variant"], job["prefix_length"], job["backbone"])
    touch(side.model)
    gc.collect()
    loading = machine.peak_mib()
    loaded = machine.status_mib("VmRSS")
    alone = machine.forget_peak()
    for batch in batches:
        step(side, batch)
        gc.collect()
    steps = machine.peak_mib()
    json.dump(
        {
            "peak_mib": max(loading, steps),
            "loading_peak_mib": loading,
            "loaded_mib": loaded,
            "steps_peak_mib": steps if alone else None,
            "step_mib": None if loaded is None else steps - loaded,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main()
