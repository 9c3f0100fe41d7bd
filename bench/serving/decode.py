"""Measure a decode step of the engine by the number of texts and the length of the prefix.

    python -m bench.serving.decode          # a minute on two cores

Texts of 64 tokens, each with a prefix of its own or (`--prefixes 1 8`) with one of a few, SmolLM2-135M in bfloat16; the
median of 20 steps in which every text adds a token and no prompt is computed.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
from itertools import product
from pathlib import Path
from statistics import median

from bench.machine import BackgroundLoad
from bench.results import FOLDER, write_results
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import load_backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.training.starts.words import from_words

PROMPT_LENGTH, STEPS, WARMUP_STEPS = 64, 20, 4


def step_seconds(backbone: Backbone, num_texts: int, prefix_length: int, num_prefixes: int = 0) -> float:
    """The median seconds of a step for this number of texts, and length and number of their prefixes; 0: one each."""
    engine = Engine(backbone, EngineConfig(num_slots=num_texts))
    new = PROMPT_LENGTH + STEPS + WARMUP_STEPS
    words = [f"Describe number {index}:" for index in range(num_prefixes or num_texts)]
    prefixes = [from_words(backbone, text, prefix_length) if prefix_length else None for text in words]
    for index in range(num_texts):
        prefix = prefixes[index % len(prefixes)]
        prompt = tuple(range(100 + index, 100 + index + PROMPT_LENGTH))
        engine.add(Request(prompt, prefix, SamplingParams(max_new_tokens=new, min_new_tokens=new)))
    while (
        not all(sequence.num_new_tokens > WARMUP_STEPS for sequence in engine.scheduler.running) or engine.num_waiting
    ):
        engine.step()
    seconds = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.step()
        seconds.append(time.perf_counter() - began)
    return median(seconds)


def main() -> int:
    """Measure, print, and write the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backbone", default="smollm2-135m")
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 10, 200])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[0], help="how many different ones; 0: one per text")
    parser.add_argument("--json", type=Path, default=FOLDER / "decode.json")
    options = parser.parse_args()
    load, backbone = BackgroundLoad(), load_backbone(options.backbone, dtype="bfloat16")
    figures = []
    for texts, length, prefixes in product(options.texts, options.lengths, options.prefixes):
        seconds = step_seconds(backbone, texts, length, prefixes)
        figure = {"texts": texts, "prefix_length": length, "seconds": round(seconds, 5)}
        figures.append(figure | ({"prefixes": prefixes} if prefixes else {}))
        print(json.dumps(figures[-1]), flush=True)
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    write_results(options.json, load, {"date": date, "figures": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
