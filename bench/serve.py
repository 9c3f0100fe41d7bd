"""Measure serving: many requests at once, or one, each with a prefix of its own, against one prefix, none, and others.

    python -m bench.serve                                  # 32 texts; about a quarter of an hour on two cores
    python -m bench.serve --texts 1 --gguf F16.gguf
    python -m bench.serve --quick                          # only to see that it works

All sides generate the same number of tokens for the same prompts (the end token is suppressed), greedily, on one
machine, each in a process of its own, in turn in one run; a ratio is the median of the paired ratios. The sides: the
engine with a prefix for each request, with one and with none; transformers' batched `generate` without a prefix; and,
if named, vLLM's server with this project's plugin with the same prefixes and without any (`--vllm-python`), llama.cpp's
server with the model in GGUF (`--gguf`, and `--llama-python`, an environment with `xllamacpp`), and the engine of
another checkout (`--before`, its `src`). Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import torch

from bench import data
from bench.child import Child
from bench.models import make_backbone
from bench.results import ROOT, DifferenceError, Figure, Log, Results, make_parser, run_benchmark
from bench.turns import ratio_figures, speed_ratios, take_turns
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.starts.words import from_words

SCRIPT = str(Path(__file__).with_name("serve_side.py"))
SEARCHED = f"{ROOT / 'src'}:{ROOT}"
"""Where a side finds its modules."""
PREFIX_LENGTH = 10
QUICK = {"texts": 4, "tokens_in": 16, "tokens_out": 6}
LEAST_AGREEMENT = 0.5
"""Least share of requests whose first token is the same on two sides; bfloat16 may change a close choice."""

NAMES = {
    "different": "engine, a prefix for each request",
    "one": "engine, one prefix",
    "none": "engine, no prefix",
    "before": "engine before, a prefix for each request",
    "transformers": "transformers' generate, no prefix",
    "vllm": "vLLM's server, no prefix",
    "vllm-different": "vLLM's server and the plugin, a prefix for each request",
    "llama": "llama.cpp's server, no prefix",
}
PAIRS = [("vllm-different", "vllm")]
PAIRS += [("different", other) for other in NAMES if other != "different"]
SAME_OUTPUT = [("different", other) for other in ("before", "vllm-different")]
SAME_OUTPUT += [("none", other) for other in ("transformers", "vllm", "llama")]
"""Pairs of sides whose outputs are the same up to rounding."""


@dataclass
class Timing:
    """What one side did.

    Attributes:
        first: Seconds to each first token.
        between: Seconds between tokens.
        first_ids: The first tokens.
    """

    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    first_ids: list[int] = field(default_factory=list)


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn."""
    settings = QUICK if options.quick else {name: getattr(options, name) for name in QUICK}
    texts, tokens_in, new = settings.values()
    backbone = make_backbone(options.backbone, "bfloat16", "cpu")
    name, examples = data.read()
    prefixes = [
        from_words(backbone, f"Describe in one sentence: {example.source}", PREFIX_LENGTH)
        for example in random.Random(0).sample(examples, texts)
    ]
    prompts = data.make_prompts(backbone, examples, texts * (options.repeats + 1), tokens_in)
    title = f"{texts} at once, {tokens_in} in, {new} out, P = {PREFIX_LENGTH}, bfloat16: "
    with tempfile.TemporaryDirectory() as folder:
        save_prefixes(Path(folder), backbone, prefixes)
        with open_sides(options, Path(folder), texts, new) as sides:
            seconds, timings = run_sides(sides, prompts, texts, new, options.repeats, log)
    speeds = {side: texts * new / median(taken) for side, taken in seconds.items()}
    ratios = speed_ratios(seconds, PAIRS)
    figures = [Figure("serve", f"{title}{NAMES[side]}", speed, "tokens/s") for side, speed in speeds.items()]
    figures += ratio_figures("serve", "", NAMES, ratios, PAIRS)
    for side in ("different", "llama"):
        if side in timings:
            for what, seen in (("first token", timings[side].first), ("between tokens", timings[side].between)):
                for percentile, value in percentiles(seen).items():
                    figures.append(Figure("serve", f"{NAMES[side]}, {what}, {percentile}", 1000 * value, "ms"))
    values = {
        "data": name,
        "settings": {**settings, "prefix_length": PREFIX_LENGTH},
        "seconds": seconds,
        "tokens_per_second": speeds,
        "speed_ratios": ratios,
        "first_tokens_agreeing": agreement({side: timing.first_ids for side, timing in timings.items()}),
    }
    return values, figures


Sides = dict[str, tuple[Child, bool | None]]
"""Name -> who answers, and whether each request has its own prefix (False: one for all, None: none)."""


@contextmanager
def open_sides(options: argparse.Namespace, folder: Path, texts: int, new: int) -> Iterator[Sides]:
    """All sides that there are, until the block ends."""
    common = ["--new", str(new), "--texts", str(texts), "--threads", str(torch.get_num_threads())]
    ours = ["--model", options.backbone, "--prefixes", str(folder), *common]
    with ExitStack() as stack:

        def start(side: str, words: Sequence[str], python: str | Path = sys.executable, path: str = SEARCHED) -> Child:
            child = Child(side, [str(python), SCRIPT, side, *words], path)
            stack.callback(child.close)
            return child

        engine = start("engine", ours)
        sides: Sides = {"different": (engine, True), "one": (engine, False), "none": (engine, None)}
        sides["transformers"] = start("transformers", ours), None
        if options.before is not None:
            sides["before"] = start("engine", ours, path=f"{options.before.resolve()}:{ROOT}"), True
        if options.vllm_python is not None:
            server = start("vllm", [*ours, "--vllm-python", str(options.vllm_python)])
            sides |= {"vllm": (server, None), "vllm-different": (server, True)}
        if options.gguf is not None:
            sides["llama"] = start("llama", ["--model", str(options.gguf), *common], options.llama_python, ""), None
        yield sides


def save_prefixes(folder: Path, backbone: Backbone, prefixes: Sequence[Prefix]) -> None:
    """Write prefixes as p0.safetensors, p1.safetensors, ..."""
    for index, prefix in enumerate(prefixes):
        save_prefix(folder / f"p{index}.safetensors", Prefix(prefix.layers, make_header(backbone)))


def run_sides(
    sides: Sides, prompts: Sequence[Sequence[int]], texts: int, new: int, repeats: int, log: Log
) -> tuple[dict[str, list[float]], dict[str, Timing]]:
    """Let all sides answer the same requests in turn.

    Raises:
        DifferenceError: A side generated another number of tokens.
    """
    timings = {side: Timing() for side in sides}

    def run(side: str, index: int) -> float:
        child, own = sides[side]
        chosen = [None if own is None else number if own else 0 for number in range(texts)]
        answer = child.answer({"prompts": prompts[index * texts : (index + 1) * texts], "prefixes": chosen})
        lengths = {len(ids) for ids in answer["tokens"]}
        if lengths != {new}:
            raise DifferenceError(f"{new} new tokens were requested, but {side!r} generated {sorted(lengths)}.")
        timings[side].first_ids += [ids[0] for ids in answer["tokens"]]
        if index:
            timings[side].first += answer["first"]
            timings[side].between += answer["between"]
        seconds: float = answer["seconds"]
        return seconds

    return take_turns(list(sides), repeats, run, log), timings


def agreement(first_ids: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """Shares of requests whose first token is the same on two sides.

    Raises:
        DifferenceError: A share is below `LEAST_AGREEMENT`.
    """
    shares = {}
    for one, other in SAME_OUTPUT:
        if {one, other} <= first_ids.keys():
            same = sum(a == b for a, b in zip(first_ids[one], first_ids[other], strict=True)) / len(first_ids[one])
            shares[f"{one} and {other}"] = same
            if same < LEAST_AGREEMENT:
                raise DifferenceError(f"only {same:.0%} of the first tokens of {one!r} and {other!r} are the same.")
    return shares


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    return {"p50": median(values), "p99": quantiles(values, n=100, method="inclusive")[98]} if len(values) > 1 else {}


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "serve", repeats=7, quick=2)
    parser.add_argument("--texts", type=int, default=32, help="at once (default %(default)s)")
    parser.add_argument("--tokens-in", type=int, default=64, help="of a prompt (default %(default)s)")
    parser.add_argument("--tokens-out", type=int, default=64, help="default %(default)s")
    parser.add_argument("--vllm-python", type=Path, help="a Python whose environment has vLLM")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python whose environment has xllamacpp")
    parser.add_argument("--before", type=Path, help="`src` of another version")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
