"""Peak memory of some training steps of one variant, in a process of its own: reads a job from stdin, writes JSON.

Run by `bench/run.py`; nothing else is loaded here, so that the peak belongs to the variant.
"""

from __future__ import annotations

import json
import sys

import torch
from data import from_lists
from sides import make_side
from steps import measure_peak


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    batches = from_lists(job["batches"])
    side = make_side(job["variant"], job["prefix_length"], job["backbone"])
    json.dump(measure_peak(side, batches), sys.stdout)


if __name__ == "__main__":
    main()
