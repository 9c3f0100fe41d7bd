"""Measure a decode step of the engine by the number of texts and the prefix's length.

    python bench/decode.py          # a minute on two cores

Texts of 64 tokens, each with a prefix of its own, SmolLM2-135M in bfloat16; the median of 20 steps in which every text
adds a token and none is read. `docs/scale.py` works with these figures.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path
from statistics import median

import machine

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.engine.engine import Engine, EngineConfig
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.training.initialize import from_words

TEXT, STEPS, WARM = 64, 20, 4


def step_seconds(backbone: Backbone, texts: int, length: int) -> float:
    """The median step of so many texts with prefixes of a length."""
    engine = Engine(backbone, EngineConfig(num_slots=texts))
    new = TEXT + STEPS + WARM
    for number in range(texts):
        prefix = from_words(backbone, f"Describe number {number}:", length) if length else None
        prompt = tuple(range(100 + number, 100 + number + TEXT))
        engine.add(Request(prompt, prefix, SamplingParams(max_new_tokens=new, min_new_tokens=new)))
    while not all(sequence.num_new > WARM for sequence in engine.scheduler.running) or engine.num_waiting:
        engine.step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> int:
    """Measure, print, and write the figures down."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 10, 200])
    parser.add_argument("--json", type=Path, default=Path(__file__).parent / "results" / "decode.json")
    options = parser.parse_args()
    neighbours, backbone, found = machine.Neighbours(), load_backbone(options.backbone, dtype="bfloat16"), []
    for texts in options.texts:
        for length in options.lengths:
            seconds = step_seconds(backbone, texts, length)
            found.append({"texts": texts, "prefix_length": length, "seconds": round(seconds, 5)})
            print(json.dumps(found[-1]), flush=True)
    command = shlex.join(["python", *sys.argv])
    written = {"command": command, "cores_used_by_others": neighbours.cores(), **machine.describe(), "figures": found}
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(written, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
