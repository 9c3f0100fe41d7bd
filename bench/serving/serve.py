"""Measure serving: many requests at once, each with a prefix of its own, against one prefix, none, and other ways.

    python bench/serve.py              # about a quarter of an hour on two cores
    python bench/serve.py --quick      # only to see that it works

All sides write the same number of tokens after the same prompts (the end token is held back), greedily, on one machine,
in turn in one run; a ratio is the median of the paired ratios. The sides: the engine with 32 prefixes, with one and
with none; transformers' batched `generate` with one prefix; PEFT with 32 adapters on one model, switched for every
request; and, where `--vllm-python` names an environment with it, vLLM's server with this project's plugin, behind the
same 32 prefixes and without any, over loopback.

PEFT 0.21 ignores its prefix in `generate()` under transformers 5.24, which renamed an argument. So that it does the
same work, its own prompt (`set_adapter`, then `get_prompt`) is handed to the model's `generate` as a filled cache: what
its `generate` meant to do. It takes one request at a time, since a batch has one adapter.

Needs `prefixtune prepare` once, and PEFT.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import data
import machine
import torch
from data import Data
from results import Line
from run import conclude
from sides import DifferenceError

from prefixtune.attention.cache import cache_argument
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.load import DEFAULT_BACKBONE, load_backbone
from prefixtune.backbone.packaged import PRETRAINED, pretrained_folder
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.engine import Engine, EngineConfig
from prefixtune.engine.request import Request, SamplingParams, SequenceOutput
from prefixtune.engine.worker import EngineWorker
from prefixtune.errors import PrefixError
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate_ids
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix, flatten
from prefixtune.server.models.store import PrefixStore
from prefixtune.training.initialize import from_words
from prefixtune.utils.console import Console
from prefixtune.utils.machine import reset_peak_memory

PREFIX_LENGTH = 10
SEED = 0
# requests, tokens in, tokens out, prefixes in the store
FULL, QUICK = (32, 64, 64, 200), (4, 16, 6, 10)
AGREEING = 0.5
"""Least share of requests whose first token is the same on two sides; bfloat16 may turn a close choice."""

NAMES = {
    "different": "engine, a prefix for each request",
    "one": "engine, one prefix",
    "none": "engine, no prefix",
    "generate": "transformers' batched generate, one prefix",
    "peft": "PEFT, an adapter for each request, switched",
    "vllm": "vLLM's server, no prefix",
    "vllm-different": "vLLM's server and the plugin, a prefix for each request",
}
GOALS = (
    ("different", "one", 0.95),
    ("different", "none", 0.95),
    ("different", "generate", 1.35),
    ("different", "peft", 8),
    # Reported, without a goal of its own.
    ("different", "vllm", None),
    ("different", "vllm-different", None),
    ("vllm-different", "vllm", None),
)

_SAME = (("different", "peft"), ("one", "generate"), ("none", "vllm"), ("different", "vllm-different"))
"""Sides that write the same, but for rounding."""

Tokens = list[list[int]]


class EngineSide:
    """Requests that are handed in at once to an engine that runs in a thread."""

    def __init__(self, worker: EngineWorker, prefixes: Sequence[Prefix | None], new: int) -> None:
        self.worker, self.prefixes = worker, prefixes
        self.sampling = SamplingParams(max_new_tokens=new, min_new_tokens=new)
        self.first: list[float] = []
        self.between: list[float] = []

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests; notes when their tokens came."""
        times: list[list[float]] = [[] for _ in prompts]
        written: Tokens = [[] for _ in prompts]
        left = threading.Semaphore(0)
        began = time.perf_counter()
        for number, (prompt, prefix) in enumerate(zip(prompts, self.prefixes, strict=True)):

            def hear(output: SequenceOutput, number: int = number) -> None:
                if output.tokens:
                    times[number].append(time.perf_counter())
                    written[number] += [token.id for token in output.tokens]
                if output.finish_reason is not None:
                    left.release()

            self.worker.submit(Request(tuple(prompt), prefix, self.sampling), hear)
        for _ in prompts:
            left.acquire()
        self.first = [marks[0] - began for marks in times if marks]
        self.between = [b - a for marks in times for a, b in itertools.pairwise(marks)]
        return written


class GenerateSide:
    """transformers' `generate`, all requests in one batch behind one prefix."""

    def __init__(self, backbone: Backbone, prefix: Prefix, new: int) -> None:
        self.backbone, self.prefix, self.new = backbone, prefix, new

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        config = GenerateConfig(max_new_tokens=self.new, min_new_tokens=self.new, batch_size=len(prompts))
        return generate_ids(self.backbone, prompts, [self.prefix] * len(prompts), config=config)


class PeftSide:
    """PEFT with one adapter per prefix on one model: switch, make the prompt, generate, one request after another."""

    def __init__(self, backbone_name: str, dtype: torch.dtype, prefixes: Sequence[Prefix], new: int) -> None:
        from peft import PrefixTuningConfig, get_peft_model
        from transformers import AutoModelForCausalLM, GenerationConfig
        from transformers.utils import logging

        folder = pretrained_folder(backbone_name) if backbone_name in PRETRAINED else backbone_name
        # transformers 5.24 on names that PEFT 0.21 uses; and a progress bar has no place in a log.
        for old in ("past_key_values", "is_gradient_checkpointing"):
            warnings.filterwarnings("ignore", f"`{old}` is deprecated", FutureWarning)
        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        made = PrefixTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=PREFIX_LENGTH, prefix_projection=False, inference_mode=True
        )
        self.peft = get_peft_model(model, made, adapter_name="0")
        for number in range(1, len(prefixes)):
            self.peft.add_adapter(str(number), made)
        with torch.no_grad():
            for number, prefix in enumerate(prefixes):
                weight = self.peft.prompt_encoder[str(number)].embedding.weight
                weight.copy_(flatten(prefix.layers["decoder"]))
        self.peft.eval()
        end = model.config.eos_token_id
        self.config = GenerationConfig(
            max_new_tokens=new, min_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=end
        )
        self.cache = cache_argument(model)

    @torch.inference_mode()
    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        written = []
        for number, prompt in enumerate(prompts):
            self.peft.set_adapter(str(number))
            # The slots that the cache already holds are to be seen in ids and mask.
            ids = torch.tensor([[self.config.pad_token_id] * PREFIX_LENGTH + list(prompt)])
            output = self.peft.get_base_model().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self.config,
                **{self.cache: self.peft.get_prompt(batch_size=1)},
            )
            written.append(output[0, ids.shape[1] :].tolist())
        return written


class VllmServer:
    """`prefixtune serve --engine vllm`, in vLLM's own environment, over prefixes in a folder of its own."""

    def __init__(self, python: Path, backbone: Backbone, prefixes: Sequence[Prefix]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.names = [f"p{number}" for number in range(len(prefixes))]
        for name, prefix in zip(self.names, prefixes, strict=True):
            save_prefix(Path(self.folder.name) / f"{name}.safetensors", Prefix(prefix.layers, make_header(backbone)))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.log = tempfile.NamedTemporaryFile("w+", suffix=".log")  # noqa: SIM115
        options = ["--engine", "vllm", "--vllm-python", str(python), "--backbone", backbone.name, "--backbone-id", "m"]
        options += ["--prefixes", self.folder.name, "--dtype", "bfloat16", "--max-length", "512", "--port", str(port)]
        source = Path(__file__).resolve().parents[1] / "src"
        self.process = subprocess.Popen(
            [sys.executable, "-m", "prefixtune", "serve", *options, f"--vllm-args=--max-num-seqs {len(prefixes)}"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(source)},
            start_new_session=True,
        )
        end = time.monotonic() + 300
        while time.monotonic() < end and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                if answer.status == 200:
                    os.killpg(self.process.pid, signal.SIGSTOP)
                    return
            time.sleep(1)
        self.close()
        raise SystemExit(f"vLLM did not start:\n{Path(self.log.name).read_text(encoding='utf-8')[-3000:]}")

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Let it run for the length of a block: even idle it would keep a core busy that another side needs."""
        os.killpg(self.process.pid, signal.SIGCONT)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def close(self) -> None:
        """End the server and what it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGTERM)
            os.killpg(self.process.pid, signal.SIGCONT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.folder.cleanup()


class VllmSide:
    """Requests to vLLM's server, all at once, each for a model of its own."""

    def __init__(self, server: VllmServer, models: Sequence[str], new: int) -> None:
        self.server, self.models, self.new = server, models, new

    def serve(self, prompts: Sequence[Sequence[int]]) -> Tokens:
        """All requests."""
        with self.server.awake(), ThreadPoolExecutor(len(prompts)) as pool:
            return list(pool.map(self._ask, self.models, prompts))

    def _ask(self, model: str, prompt: Sequence[int]) -> list[int]:
        asked = {"model": model, "prompt": list(prompt), "max_tokens": self.new, "temperature": 0, "ignore_eos": True}
        body = json.dumps({**asked, "return_token_ids": True}).encode()
        request = urllib.request.Request(
            f"{self.server.url}/v1/completions", body, {"Content-Type": "application/json"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=300) as answer:
            ids: list[int] = json.load(answer)["choices"][0]["token_ids"]
        return ids


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.add_argument("--repeats", type=int, help="timed rounds; a further one warms up (default 7; quick: 2)")
    parser.add_argument("--quick", action="store_true", help="tiny settings, to see that it works; no figure counts")
    parser.add_argument("--backbone", default=DEFAULT_BACKBONE, help="name, hub id or folder (default %(default)s)")
    parser.add_argument("--without-peft", action="store_true", help="leave that side out")
    parser.add_argument(
        "--vllm-python", type=Path, help="Python of an environment with vLLM: its server is measured, too"
    )
    parser.add_argument(
        "--json",
        type=Path,
        default=Path(__file__).resolve().parent / "results" / "serve.json",
        help="where the figures go (default bench/results/serve.json)",
    )
    options = parser.parse_args()
    options.repeats = options.repeats or (2 if options.quick else 7)
    if options.repeats < 1:
        parser.error(f"--repeats {options.repeats}: at least 1 is needed")
    return options


def main() -> int:
    options, console = parse(), Console()
    neighbours = machine.Neighbours()
    if neighbours.busy_at_start:
        console.warn(f"the machine is busy (load average {neighbours.load:.2f}); do not take the figures seriously.")
    if options.quick:
        console.warn("--quick only shows that the benchmark works; do not take its figures seriously.")
    began = time.monotonic()
    try:
        found, lines = measure(options, console.info)
    except PrefixError as error:
        console.error(error.message, error.hint)
        return 2
    except DifferenceError as error:
        console.error(str(error), "a comparison of speed would mean nothing; nothing was written.")
        return 1
    conclude(options, console, neighbours, began, found, lines)
    return 0


def measure(options: argparse.Namespace, say: Callable[[str], None]) -> tuple[dict[str, Any], list[Line]]:
    """All sides in turn, and what prefixes take; the figures, and the table's lines."""
    requests, tokens_in, new, stored = QUICK if options.quick else FULL
    backbone = load_backbone(options.backbone, dtype="bfloat16", device="cpu")
    read = data.read(None)
    prefixes = make_prefixes(backbone, read, requests)
    prompts = make_prompts(backbone, read, requests * (options.repeats + 1), tokens_in)
    dtype = str(backbone.dtype).removeprefix("torch.")
    title = f"{requests} requests, {tokens_in} in, {new} out, P = {PREFIX_LENGTH}, {dtype}"
    say(title)
    memory = measure_memory(backbone, prefixes[0], stored)
    with EngineWorker(Engine(backbone, EngineConfig(num_slots=requests))) as worker:
        different = EngineSide(worker, prefixes, new)
        sides: dict[str, Any] = {
            "different": different,
            "one": EngineSide(worker, [prefixes[0]] * requests, new),
            "none": EngineSide(worker, [None] * requests, new),
            "generate": GenerateSide(backbone, prefixes[0], new),
        }
        if not options.without_peft:
            sides["peft"] = PeftSide(options.backbone, backbone.dtype, prefixes, new)
        if options.vllm_python is not None:
            vllm = VllmServer(options.vllm_python, backbone, prefixes)
            sides["vllm"] = VllmSide(vllm, ["m"] * requests, new)
            sides["vllm-different"] = VllmSide(vllm, vllm.names, new)
        try:
            seconds, agreeing, first, between = take_turns(sides, prompts, requests, new, say)
        finally:
            if "vllm" in sides:
                vllm.close()
        slots = worker.engine.cache.num_bytes
    speeds = {side: requests * new / median(taken) for side, taken in seconds.items()}
    ratios = {
        f"{one} / {other}": [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
        for one, other, _ in GOALS
        if other in seconds
    }
    latencies = {"first_token": percentiles(first), "between_tokens": percentiles(between)}
    found = {
        "data": read.describe(),
        "settings": {"requests": requests, "tokens_in": tokens_in, "tokens_out": new, "prefix_length": PREFIX_LENGTH},
        "dtype": dtype,
        "seconds": seconds,
        "tokens_per_second": speeds,
        "speed_ratios": ratios,
        "first_tokens_agreeing": agreeing,
        "latency_seconds": latencies,
        "memory": {**memory, "slots_bytes": slots},
    }
    lines = [
        Line("serve", f"{title}: {name}", speeds[side], "tokens/s") for side, name in NAMES.items() if side in speeds
    ]
    for one, other, goal in GOALS:
        what = f"{NAMES[one]} / {NAMES[other]}"
        if other in seconds:
            lines.append(Line("serve", what, median(ratios[f"{one} / {other}"]), "x", at_least=goal))
        else:
            lines.append(Line("serve", what, None, reason="left out"))
    for name, marks in latencies.items():
        for mark, value in marks.items():
            what = f"{NAMES['different']}, {name.replace('_', ' ')}, {mark}"
            lines.append(Line("serve", what, value * 1000, "ms"))
    if memory["resident_mib_per_1000"] is not None:
        lines.append(Line("serve", "memory of 1,000 prefixes at hand", memory["resident_mib_per_1000"], "MiB"))
    lines.append(Line("serve", "their numbers alone", memory["tensor_mib_per_1000"], "MiB"))
    lines.append(Line("serve", f"keys and values of {requests} slots", slots / 2**20, "MiB"))
    return found, lines


def make_prefixes(backbone: Backbone, read: Data, count: int) -> list[Prefix]:
    """Different prefixes, from different words."""
    examples = random.Random(SEED).sample(read.examples, count)
    return [
        from_words(backbone, f"Describe in one sentence: {example.source}", PREFIX_LENGTH).to(backbone.dtype)
        for example in examples
    ]


def make_prompts(backbone: Backbone, read: Data, count: int, length: int) -> list[list[int]]:
    """Different prompts of exactly so many tokens."""
    shuffled = random.Random(SEED + 1)
    prompts = []
    for _ in range(count):
        ids: list[int] = []
        while len(ids) < length:
            ids += backbone.encode(f"{shuffled.choice(read.examples).source}\n")
        prompts.append(ids[:length])
    return prompts


def take_turns(
    sides: Mapping[str, Any], prompts: Tokens, requests: int, new: int, say: Callable[[str], None]
) -> tuple[dict[str, list[float]], dict[str, float], list[float], list[float]]:
    """Let all sides serve the same requests in turn, A B C, C B A, ...; the first round warms up.

    Returns:
        Every side's seconds by round; which share of first tokens agrees between sides that do the same; and the
        seconds to the first token and between tokens of different prefixes.

    Raises:
        DifferenceError: A side wrote another number of tokens, or clearly another text.
    """
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    first: list[float] = []
    between: list[float] = []
    heads: dict[str, list[int]] = {side: [] for side in sides}
    for number in range(len(prompts) // requests):
        chosen = prompts[number * requests : (number + 1) * requests]
        for side in sides if number % 2 else reversed(sides):
            gc.collect()
            began = time.perf_counter()
            written = sides[side].serve(chosen)
            taken = time.perf_counter() - began
            lengths = {len(ids) for ids in written}
            if lengths != {new}:
                raise DifferenceError(f"{new} new tokens were asked for, but {side!r} wrote {sorted(lengths)}.")
            heads[side] += [ids[0] for ids in written]
            if number:
                seconds[side].append(taken)
                if side == "different":
                    first += sides[side].first
                    between += sides[side].between
        if number:
            say(f"  {number}: " + ", ".join(f"{side} {taken[-1]:.2f} s" for side, taken in seconds.items()))
    agreeing = {}
    for one, other in _SAME:
        if one in heads and other in heads:
            same = sum(a == b for a, b in zip(heads[one], heads[other], strict=True)) / len(heads[one])
            agreeing[f"{one} and {other}"] = same
            if same < AGREEING:
                raise DifferenceError(f"only {same:.0%} of the first tokens of {one!r} and {other!r} are the same.")
    return seconds, agreeing, first, between


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median and the 99th percentile."""
    return {"p50": median(values), "p99": quantiles(values, n=100, method="inclusive")[98]}


def measure_memory(backbone: Backbone, prefix: Prefix, count: int) -> dict[str, Any]:
    """What a store takes for prefixes that it has at hand, by the process's size."""
    with tempfile.TemporaryDirectory() as folder:
        stored = Prefix(prefix.layers, make_header(backbone))
        path = save_prefix(Path(folder) / "p0.safetensors", stored, dtype=torch.bfloat16)
        size = path.stat().st_size
        for number in range(1, count):
            (Path(folder) / f"p{number}.safetensors").hardlink_to(path)
        store = PrefixStore(folder, backbone, max_bytes=2**33)
        # What the first one needs besides is not counted.
        store.get("p0")
        # Memory that was freed goes back to the system; else the prefixes would fill it unseen.
        reset_peak_memory()
        before = machine.status_mib("VmRSS")
        began = time.perf_counter()
        for number in range(1, count):
            store.get(f"p{number}")
        taken = time.perf_counter() - began
        after = machine.status_mib("VmRSS")
        grown = None if before is None or after is None else (after - before) * 1000 / (count - 1)
        return {
            "prefixes": count,
            "file_bytes": size,
            "tensor_mib_per_1000": store.stats.bytes * 1000 / count / 2**20,
            "resident_mib_per_1000": grown,
            "load_seconds_each": taken / (count - 1),
        }


if __name__ == "__main__":
    sys.exit(main())
