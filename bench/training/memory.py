"""Peak memory of some training steps of one variant: reads a job from stdin, writes JSON.

`bench.run` starts it in a process of its own, so that the peak belongs to the variant.
"""

from __future__ import annotations

import json
import sys

import torch

from bench.data import from_lists
from bench.training.sides import make_side
from bench.training.steps import measure_peak


def main() -> None:
    """Read a job, measure, and print."""
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    batches = from_lists(job["batches"])
    side = make_side(job["variant"], job["prefix_length"], job["backbone"])
    json.dump(measure_peak(side, batches), sys.stdout)


if __name__ == "__main__":
    main()
