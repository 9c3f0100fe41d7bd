"""Measure serving, server against server: one client asks them all over HTTP, streaming, greedy, the same prompts.

    python -m bench.serve                                  # 32 texts; about a quarter of an hour on two cores
    python -m bench.serve --texts 1 --prefix-length 64 --gguf F16.gguf
    python -m bench.serve --vllm-python PYTHON --before OTHER/src
    python -m bench.serve --quick                          # only to see that it works

The sides take turns in one run, and sleep meanwhile; a ratio is the median of the paired ratios. They generate the same
number of tokens, as the end token is suppressed. Always there: `prefixtune serve` with the engine torch, with a prefix
for each request, with one and with none; the engine in this process; and transformers' batched `generate` with one
prefix. With `--gguf`: the engine llama.cpp, and llama.cpp's own server. With `--vllm-python`: the engine vLLM, and
vLLM's own server. With `--before`: the server of another checkout. Prefixes move on by one request in each round, so
that with one text at a time a slot never holds the right one. Needs `prefixtune prepare` once.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from bench import data
from bench.models import make_backbone, model_folder
from bench.results import ROOT, DifferenceError, Figure, Log, Results, make_parser, run_benchmark
from bench.server import Done, Server
from bench.turns import ratio_figures, speed_ratios, take_turns
from prefixtune.attention.layout import cache_argument, growing_cache
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine import Request, TorchEngine
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.training.starts.words import from_words

LLAMA_SERVER = str(Path(__file__).with_name("llama_server.py"))
SRC = str(ROOT / "src")
QUICK = {"texts": 4, "tokens_in": 16, "tokens_out": 6}

NAMES = {
    "torch": "torch, a prefix for each request",
    "torch-one": "torch, one prefix",
    "torch-none": "torch, no prefix",
    "before": "torch before, a prefix for each request",
    "process": "torch in this process, a prefix for each request",
    "transformers": "transformers' generate, one prefix",
    "llama": "llama.cpp, a prefix for each request",
    "llama-one": "llama.cpp, one prefix",
    "llama-none": "llama.cpp, no prefix",
    "llama-server": "llama.cpp's own server, no prefix",
    "vllm": "vLLM, a prefix for each request",
    "vllm-one": "vLLM, one prefix",
    "vllm-none": "vLLM, no prefix",
    "vllm-server": "vLLM's own server, no prefix",
}
PAIRS = [("torch", other) for other in NAMES if other != "torch"]
PAIRS += [(side, f"{engine}-server") for engine in ("llama", "vllm") for side in (engine, f"{engine}-none")]
SAME_TEXTS = [("torch", other) for other in ("before", "process", "llama", "vllm")]
SAME_TEXTS += [("torch-one", "transformers"), ("torch-one", "llama-one"), ("torch-none", "llama-server")]
"""Pairs of sides whose texts are the same, up to near ties; in float32, and GGUF in F16."""

Side = Callable[[Sequence[list[int]], int], Done]
"""Answers the prompts of a round, whose number it gets."""


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All sides in turn."""
    settings = QUICK if options.quick else {name: getattr(options, name) for name in QUICK}
    texts, tokens_in, new = settings.values()
    backbone = make_backbone(options.backbone, options.dtype, "cpu")
    name, examples = data.read()
    chosen = random.Random(0).sample(examples, max(2, texts))
    prefixes = [from_words(backbone, f"Describe: {one.source}", options.prefix_length) for one in chosen]
    prompts = data.make_prompts(backbone, examples, texts * (options.repeats + 1), tokens_in)
    done: dict[str, list[Done]] = {}

    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        save_prefixes(Path(folder), backbone, prefixes)
        sides = stack.enter_context(open_sides(options, backbone, prefixes, Path(folder), texts, new, tokens_in))

        def run(side: str, index: int) -> float:
            one = sides[side](prompts[index * texts : (index + 1) * texts], index)
            if one.tokens != texts * new:
                raise DifferenceError(f"{texts * new} tokens were asked for, but {side!r} generated {one.tokens}.")
            done.setdefault(side, []).append(one)
            return one.seconds

        seconds = take_turns(list(sides), options.repeats, run, log)
    speeds = {side: texts * new / median(taken) for side, taken in seconds.items()}
    ratios = speed_ratios(seconds, PAIRS)
    title = f"{texts} at once, {tokens_in} in, {new} out, P = {options.prefix_length}, {options.dtype}: "
    figures = [Figure("serve", f"{title}{NAMES[side]}", speed, "tokens/s") for side, speed in speeds.items()]
    figures += ratio_figures("serve", "", NAMES, ratios, PAIRS)
    times: dict[str, dict[str, float]] = {}
    for side, rounds in done.items():
        for what in ("first", "between"):
            seen = [value for one in rounds[1:] for value in getattr(one, what)]
            if len(seen) > 1:
                found = {"p50": median(seen), "p99": quantiles(seen, n=100, method="inclusive")[98]}
                times.setdefault(side, {}).update({f"{what}_{name}": value for name, value in found.items()})
                figures.append(Figure("serve", f"{NAMES[side]}, {what}, p50", 1000 * found["p50"], "ms"))
    same = same_texts(done)
    figures += [Figure("serve", f"same texts: {pair}", share) for pair, share in same.items()]
    values = {
        "data": name,
        "settings": {**settings, "prefix_length": options.prefix_length, "dtype": options.dtype},
        "seconds": seconds,
        "tokens_per_second": speeds,
        "speed_ratios": ratios,
        "piece_seconds": times,
        "same_texts": same,
    }
    return values, figures


@contextmanager
def open_sides(
    options: argparse.Namespace,
    backbone: Backbone,
    prefixes: Sequence[Prefix],
    folder: Path,
    texts: int,
    new: int,
    tokens_in: int,
) -> Iterator[dict[str, Side]]:
    """All sides that there are, until the block ends."""
    length = str(options.prefix_length + tokens_in + new + 8)
    threads = str(torch.get_num_threads())
    own = ["--backbone", options.backbone, "--backbone-id", "m", "--prefixes", str(folder), "--port", "{port}"]
    own += ["--num-slots", str(texts), "--max-length", length, "--quiet"]
    sides: dict[str, Side] = {}
    with ExitStack() as stack:

        def start(
            kind: str, command: Sequence[str], ending: Mapping[str, Any], models: Mapping[str, int | None], path: str
        ) -> None:
            """Start a server with several sides: suffix -> how many prefixes they use; None: the model is not named."""
            server = Server(kind, command, path)
            stack.callback(server.close)
            for suffix, count in models.items():
                sides[kind + suffix] = over_http(server, {"max_tokens": new, **ending}, count)

        def serve(kind: str, engine: str, more: Sequence[str], ending: Mapping[str, Any], path: str = SRC) -> None:
            words = [sys.executable, "-m", "prefixtune", "serve", *own, *engine.split(), *more]
            models = {"": len(prefixes), **({} if kind == "before" else {"-one": 1, "-none": 0})}
            start(kind, words, ending, models, path)

        exact, ends = {"min_tokens": new}, backbone.tokenizer.all_special_ids
        no_end = {"logit_bias": {str(token): -100 for token in ends}}
        serve("torch", "--engine torch", ["--dtype", options.dtype], exact)
        if options.before is not None:
            serve("before", "", ["--dtype", options.dtype], exact, str(options.before.resolve()))
        if options.gguf is not None:
            gguf = str(options.gguf.resolve())
            serve("llama", "--engine llama.cpp", ["--gguf", gguf, "--threads", threads], no_end)
            command = [options.llama_python, LLAMA_SERVER, gguf, str(texts), length, threads, "{port}"]
            start("llama", command, {"ignore_eos": True, "cache_prompt": False}, {"-server": None}, "")
        if options.vllm_python is not None:
            python = str(options.vllm_python)
            serve("vllm", "--engine vllm", ["--vllm-python", python, "--dtype", options.dtype], exact)
            command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model_folder(options.backbone)]
            command += ["--served-model-name", "m", "--dtype", options.dtype, "--port", "{port}"]
            command += ["--max-model-len", length, "--max-num-seqs", str(texts)]
            start("vllm", command, {"ignore_eos": True}, {"-server": 0}, "")
        sides["process"] = in_process(backbone, prefixes, texts, new, int(length))
        sides["transformers"] = by_transformers(backbone, prefixes[0], new)
        yield sides


def over_http(server: Server, common: Mapping[str, Any], num_prefixes: int | None) -> Side:
    """A side that is a server, which has the prefixes p0, p1, ..., and the bare model m."""

    def answer(prompts: Sequence[list[int]], index: int) -> Done:
        bodies: list[dict[str, Any]] = [{"prompt": prompt, **common} for prompt in prompts]
        for number, body in enumerate(bodies):
            body["model"] = f"p{(number + index) % num_prefixes}" if num_prefixes else "m"
        return server.complete(bodies)

    return answer


def in_process(backbone: Backbone, prefixes: Sequence[Prefix], texts: int, new: int, length: int) -> Side:
    """The torch engine without a server."""
    engine = TorchEngine(backbone, num_slots=texts, max_length=length)
    sampling = {"max_new_tokens": new, "min_new_tokens": new}

    def answer(prompts: Sequence[list[int]], index: int) -> Done:
        own = [prefixes[(number + index) % len(prefixes)] for number in range(len(prompts))]
        began = time.perf_counter()
        requests = [
            Request(tuple(ids), prefix, sampling, verbatim=True)  # type: ignore[arg-type]
            for ids, prefix in zip(prompts, own, strict=True)
        ]
        found = [output for (output,) in engine.run(requests)]
        seconds = time.perf_counter() - began
        return Done(seconds, [one.text for one in found], sum(len(one.tokens) for one in found))

    return answer


def by_transformers(backbone: Backbone, prefix: Prefix, new: int) -> Side:
    """The `generate` of transformers, one batch, whose cache begins with one prefix."""
    from transformers import GenerationConfig

    end = backbone.eos_id
    config = GenerationConfig(
        max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=end
    )

    def answer(prompts: Sequence[list[int]], index: int) -> Done:
        began = time.perf_counter()
        cache = growing_cache(backbone.model)
        for layer, pair in enumerate(prefix.layers["decoder"]):
            key, value = (part.to(backbone.model.dtype).expand(len(prompts), *part.shape) for part in pair)
            cache.update(key, value, layer)
        # Any tokens stand for the prefix.
        ids = torch.tensor([[end] * prefix.length() + prompt for prompt in prompts])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), cache_argument(backbone.model): cache}
        with torch.inference_mode():
            output = backbone.model.generate(**inputs, generation_config=config)
        rows = output[:, ids.shape[1] :].tolist()
        texts = [backbone.decode(row) for row in rows]
        return Done(time.perf_counter() - began, texts, sum(map(len, rows)))

    return answer


def save_prefixes(folder: Path, backbone: Backbone, prefixes: Sequence[Prefix]) -> None:
    """Write prefixes as p0.safetensors, p1.safetensors, ..."""
    for index, prefix in enumerate(prefixes):
        save_prefix(folder / f"p{index}.safetensors", Prefix(prefix.layers, make_header(backbone)))


def same_texts(done: Mapping[str, Sequence[Done]]) -> dict[str, float]:
    """Shares of requests whose texts are the same on two sides."""
    shares = {}
    for one, other in SAME_TEXTS:
        if {one, other} <= done.keys():
            rows = zip(done[one], done[other], strict=True)
            pairs = [pair for a, b in rows for pair in zip(a.texts, b.texts, strict=True)]
            shares[f"{one} and {other}"] = sum(a.strip() == b.strip() for a, b in pairs) / len(pairs)
    return shares


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "serve", repeats=7, quick=1)
    parser.add_argument("--texts", type=int, default=32, help="at once (default %(default)s)")
    parser.add_argument("--tokens-in", type=int, default=64, help="of a prompt (default %(default)s)")
    parser.add_argument("--tokens-out", type=int, default=64, help="default %(default)s")
    parser.add_argument("--prefix-length", type=int, default=10, help="default %(default)s")
    parser.add_argument("--dtype", default="bfloat16", help="of torch and vLLM (default %(default)s)")
    parser.add_argument("--vllm-python", type=Path, help="a Python whose environment has vLLM")
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp")
    parser.add_argument("--llama-python", default=sys.executable, help="a Python whose environment has xllamacpp")
    parser.add_argument("--before", type=Path, help="`src` of another version")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
