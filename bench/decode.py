"""Measure a decode step of the engine by the number of texts and the length of the prefix.

    python -m bench.decode          # a minute on two cores

Texts of 64 tokens, each with a prefix of its own or (`--prefixes 1 8`) with one of a few, SmolLM2-135M in bfloat16; the
median of 20 steps in which every text adds a token and no prompt is computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from itertools import product
from statistics import median

from bench.models import make_backbone
from bench.results import Figure, Log, Results, make_parser, run_benchmark
from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.request import Request, SamplingParams
from prefixtune.training.starts.words import from_words

PROMPT_LENGTH, WARMUP_STEPS = 64, 4


def step_seconds(backbone: Backbone, num_texts: int, prefix_length: int, num_prefixes: int, steps: int) -> float:
    """The median seconds of a step for this number of texts, and length and number of their prefixes; 0: one each."""
    engine = Engine(backbone, EngineConfig(num_slots=num_texts))
    new = PROMPT_LENGTH + steps + WARMUP_STEPS
    words = [f"Describe number {index}:" for index in range(num_prefixes or num_texts)]
    prefixes = [from_words(backbone, text, prefix_length) if prefix_length else None for text in words]
    for index in range(num_texts):
        prefix = prefixes[index % len(prefixes)]
        prompt = tuple(range(100 + index, 100 + index + PROMPT_LENGTH))
        engine.add(Request(prompt, prefix, SamplingParams(max_new_tokens=new, min_new_tokens=new)))
    written: dict[str, int] = {}
    seconds: list[float] = []
    while len(seconds) < steps:
        began = time.perf_counter()
        outputs = engine.step()
        if len(written) == num_texts and min(written.values()) > WARMUP_STEPS:
            seconds.append(time.perf_counter() - began)
        for output in outputs:
            written[output.request_id] = written.get(output.request_id, 0) + len(output.tokens)
    return median(seconds)


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All figures."""
    backbone = make_backbone(options.backbone, "bfloat16", "cpu")
    rows, figures = [], []
    for texts, length, prefixes in product(options.texts, options.lengths, options.prefixes):
        seconds = step_seconds(backbone, texts, length, prefixes, options.repeats)
        rows.append({"texts": texts, "prefix_length": length, "prefixes": prefixes or texts, "seconds": seconds})
        name = f"{texts} texts, P = {length}, {prefixes or texts} prefixes"
        figures.append(Figure("decode", name, 1000 * seconds, "ms a step"))
        log(f"{name}: {1000 * seconds:.2f} ms")
    return {"figures": rows}, figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "decode", repeats=20, quick=3)
    parser.add_argument("--texts", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[0, 10, 200])
    parser.add_argument("--prefixes", type=int, nargs="+", default=[0], help="how many different ones; 0: one per text")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
