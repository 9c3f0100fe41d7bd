"""Measure one text at a time: the engine and `generate` against llama.cpp, transformers, and an earlier version.

    python -m bench.serving.one_text --llama-python LLAMA/bin/python       # some minutes on two cores
    python -m bench.serving.one_text --quick                               # only to see that it works

All sides continue the same prompts greedily by the same number of tokens, one text at a time, each in a process of its
own, in turn in one run, A B C, C B A, ...; a ratio is the median of the paired ratios of tokens per second after the
first token. In bfloat16, llama.cpp in F16 and Q8_0 of the same weights; `--int8` adds the engine with int8 weights.

llama.cpp needs an environment with `xllamacpp`; without `--llama-python` this one is tried, and if it has none, these
sides are left out. `--before SRC` adds the engine of another checkout's `src`.

Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from bench import data
from bench.results import FOLDER, DifferenceError, Figure, Log, PeerError, Results, run_benchmark
from bench.serving.child import ROOT, Child
from bench.serving.gguf_file import write_gguf
from bench.serving.serve import make_prompts
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.utils.console import Console

SCRIPT = Path(__file__).with_name("one_text_side.py")
# tokens in, tokens out
FULL, QUICK = (60, 64), (8, 4)
LEAST_AGREEMENT = 0.5
"""Least share of texts whose first token is transformers'; rounding may change a close choice."""
NAMES = {
    "engine": "engine, bfloat16",
    "int8": "engine, int8 weights",
    "before": "engine before, bfloat16",
    "generate": "generate, bfloat16",
    "transformers": "transformers' generate, bfloat16",
    "F16": "llama.cpp's server, F16",
    "Q8_0": "llama.cpp's server, Q8_0",
}
GOALS = (
    ("engine", "F16", 1.0),
    ("engine", "Q8_0", None),
    ("int8", "Q8_0", None),
    ("int8", "engine", None),
    ("engine", "transformers", 3.5),
    ("generate", "transformers", None),
    ("engine", "before", None),
)


@dataclass
class Timing:
    """What one side took.

    Attributes:
        first: Seconds until each text's first token.
        speed: Tokens per second after it.
        first_ids: The first tokens.
    """

    first: list[float]
    speed: list[float]
    first_ids: list[int]


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed texts; a further one warms up (default 7; quick: 1)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--llama-python", type=Path, help="a Python whose environment has xllamacpp")
    parser.add_argument("--int8", action="store_true", help="also the engine with --quantize int8")
    parser.add_argument("--before", type=Path, help="`src` of another version")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="of each side (default %(default)s)"
    )
    parser.add_argument("--json", type=Path, default=FOLDER / "one_text.json", help="where the figures go")
    options = parser.parse_args()
    options.repeats = options.repeats or (1 if options.quick else 7)
    return options


def measure(options: argparse.Namespace, console: Console) -> Results:
    """All figures."""
    backbone = load_backbone(options.backbone, dtype="float32")
    tokens_in, new = QUICK if options.quick else FULL
    examples = data.read(None)
    prompts = make_prompts(backbone, examples, options.repeats + 1, tokens_in)
    with open_sides(options, backbone, new, console.info) as sides:
        timings = take_turns(sides, prompts, new, console.info)
    ratios = {
        f"{one} / {other}": [a / b for a, b in zip(timings[one].speed, timings[other].speed, strict=True)]
        for one, other, _ in GOALS
        if {one, other} <= timings.keys()
    }
    values = {
        "data": examples.describe(),
        "settings": {"tokens_in": tokens_in, "tokens_out": new, "threads": options.threads},
        "tokens_per_second": {name: timing.speed for name, timing in timings.items()},
        "first_token_seconds": {name: timing.first for name, timing in timings.items()},
        "speed_ratios": ratios,
    }
    title = f"one text, {tokens_in} in, {new} out"
    figures = [
        Figure("one text", f"{title}: {NAMES[name]}", median(timing.speed), "tokens/s")
        for name, timing in timings.items()
    ]
    for one, other, goal in GOALS:
        name, found = f"{NAMES[one]} / {NAMES[other]}", ratios.get(f"{one} / {other}")
        if found is None:
            figures.append(Figure("one text", name, None, reason="left out"))
        else:
            figures.append(Figure("one text", name, median(found), "x", at_least=goal))
    for name, timing in timings.items():
        figures.append(Figure("one text", f"{NAMES[name]}, first token", median(timing.first) * 1000, "ms"))
    return values, figures


@contextlib.contextmanager
def open_sides(options: argparse.Namespace, backbone: Backbone, new: int, log: Log) -> Iterator[dict[str, Child]]:
    """All sides that there are, until the block ends."""
    here, common = f"{ROOT / 'src'}:{ROOT}", ["--new", str(new), "--threads", str(options.threads)]
    ours = [sys.executable, str(SCRIPT)]
    model = ["--model", options.backbone, *common]
    starts: dict[str, tuple[list[str], str]] = {
        "engine": ([*ours, "engine", *model], here),
        "generate": ([*ours, "generate", *model], here),
        "transformers": ([*ours, "transformers", *model], here),
    }
    if options.int8:
        starts["int8"] = ([*ours, "engine", *model, "--quantize", "int8"], here)
    if options.before is not None:
        starts["before"] = ([*ours, "engine", *model], f"{options.before.resolve()}:{ROOT}")
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        python = str(options.llama_python or sys.executable)
        if _has_llama(python):
            for kind in ("F16", "Q8_0"):
                path = write_gguf(Path(folder) / f"{kind}.gguf", backbone, kind)
                starts[kind] = ([python, str(SCRIPT), "llama", "--model", str(path), *common], "")
        else:
            log("llama.cpp is left out: xllamacpp is not installed (name a Python that has it by --llama-python).")
        sides = {}
        for name, (command, path_of) in starts.items():
            side = sides[name] = Child(NAMES[name], command, path_of)
            stack.callback(side.close)
        yield sides


def _has_llama(python: str) -> bool:
    try:
        return subprocess.run([python, "-c", "import xllamacpp"], capture_output=True, timeout=120).returncode == 0
    except OSError as error:
        raise PeerError(f"{python} cannot be started: {error.strerror}") from error


def take_turns(sides: Mapping[str, Child], prompts: Sequence[Sequence[int]], new: int, log: Log) -> dict[str, Timing]:
    """Let all sides continue the same prompts in turn; the first round warms up.

    Raises:
        DifferenceError: A side generated another number of tokens, or clearly another text.
    """
    order = list(sides)
    timings = {name: Timing([], [], []) for name in order}
    for index, prompt in enumerate(prompts):
        for name in order if index % 2 else reversed(order):
            answer = sides[name].answer(list(prompt))
            seconds, tokens = answer["seconds"], answer["tokens"]
            if len(tokens) != new:
                raise DifferenceError(f"{new} new tokens were requested, but {name!r} generated {len(tokens)}.")
            timing = timings[name]
            timing.first_ids.append(tokens[0])
            if index:
                timing.first.append(seconds[0])
                timing.speed.append((new - 1) / (seconds[-1] - seconds[0]))
        if index:
            log(f"  {index}: " + ", ".join(f"{name} {timing.speed[-1]:.1f}" for name, timing in timings.items()))
    for name, timing in timings.items():
        pairs = zip(timing.first_ids, timings["transformers"].first_ids, strict=True)
        same = sum(a == b for a, b in pairs) / len(prompts)
        if same < LEAST_AGREEMENT:
            raise DifferenceError(f"only {same:.0%} of the first tokens of {name!r} are those of transformers.")
    return timings


def main() -> int:
    """Measure, print, and write the figures."""
    options = parse()
    return run_benchmark(options, lambda console: measure(options, console))


if __name__ == "__main__":
    sys.exit(main())
