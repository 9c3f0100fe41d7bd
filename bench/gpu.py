"""Measure what only a GPU tells (`make gpu`): loading, a training step, decoding, and the memory of a long prompt.

    python -m bench.gpu                                # on a GPU; writes bench/results/gpu.json
    python -m bench.gpu --device cpu --tiny            # on a CPU in seconds, to see that it works: latest.json there
    python -m bench.gpu --models smollm2-135m --parts load,decode

Every part of every model runs in a process of its own; what fails is a line of the table with its reason, and the rest
goes on. SmolLM2-135M is read from its files; the LLaMAs have random weights, made on the device, which say something
of speed and memory alone. `python -m tools.gpu_page` writes docs/gpu.md from the results.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

from bench.machine import memory_mib, reset_peak_memory, wait
from bench.models import SHAPES, cache_mib, make_backbone, save_model
from bench.results import FOLDER, Figure, Log, PeerError, Results, make_parser, run_benchmark
from bench.serve import SRC, in_process, over_http, save_prefixes
from bench.server import Server
from bench.turns import isolated
from prefixtune.errors import first_line, is_out_of_memory

PREFIX_LENGTH, PROMPT_LENGTH = 10, 64
OUTPUT = FOLDER / "gpu.json"


@dataclass(frozen=True)
class Plan:
    """What is measured of a model.

    Attributes:
        device: Where.
        model: Its name.
        path: Its files, for what reads them; empty: there are none.
        prefix_lengths: P of the training steps.
        settings: Pairs of a training step, and targets of each source.
        sizes: Tokens of a source and of a target.
        texts: Decoded at once.
        new: Tokens of each.
        prompt: Tokens of the long prompt.
        repeats: Timed rounds.
        vllm_python: Python of an environment with vLLM; empty: there is none.
    """

    device: str
    model: str
    path: str = ""
    prefix_lengths: tuple[int, ...] = (10, 100, 500)
    settings: tuple[tuple[int, int], ...] = ((16, 1), (16, 4))
    sizes: tuple[int, int] = (128, 64)
    texts: tuple[int, ...] = (1, 8, 32, 128)
    new: int = 64
    prompt: int = 32_768
    repeats: int = 7
    vllm_python: str = ""

    def tiny(self) -> Plan:
        """The same in seconds on a CPU."""
        small = replace(self, prefix_lengths=(2,), settings=((4, 2),), sizes=(6, 4))
        return replace(small, texts=(3,), new=4, prompt=200)


def load(plan: Plan, quantize: str) -> list[Figure]:
    """Seconds and peak memory of reading a model's files."""
    from prefixtune.backbone.load import load_backbone

    # The check at the first load of a type is not loading.
    os.environ["PREFIXTUNE_SELF_CHECK"] = "0"
    reset_peak_memory(plan.device)
    before, began = memory_mib() or 0.0, time.perf_counter()
    backbone = load_backbone(plan.path, dtype="bfloat16", device=plan.device, quantize=quantize)
    wait(plan.device)
    name, seconds = f"{plan.model}{f', {quantize}' * bool(quantize)}", time.perf_counter() - began
    figures = [
        Figure("load", f"{name}: seconds", seconds, "s"),
        Figure("load", f"{name}: host, peak above the start", (memory_mib(peak=True) or 0.0) - before, "MiB"),
        Figure("load", f"{name}: parameters", float(backbone.num_parameters)),
    ]
    return figures + _device_memory(plan, "load", name)


def train(plan: Plan, library: str) -> list[Figure]:
    """Training steps of one library, in bfloat16: median seconds, target tokens per second and peak memory."""
    from bench.data import random_batches
    from bench.train_sides import make_side, num_target_tokens, timed_step

    figures: list[Figure] = []
    variant = {"PEFT": "peft-bf16", "prefixtune": "ours-bf16"}[library]
    for length in plan.prefix_lengths:
        side = make_side(variant, length, plan.model, plan.device)
        for setting in plan.settings:
            batches = random_batches(setting, plan.sizes, number=plan.repeats + 1)
            reset_peak_memory(plan.device)
            name = f"{plan.model}, P = {length}, {setting[0]} pairs, {setting[1]} of a source: {library}"
            try:
                seconds = median([timed_step(side, batch)[0] for batch in batches][1:])
            except Exception as error:
                figures.append(Figure("train", name, None, reason=_reason(error)))
                continue
            figures.append(Figure("train", name, num_target_tokens(batches[0]) / seconds, "target tokens/s"))
            figures += _device_memory(plan, "train", name)
        del side
    return figures


def decode(plan: Plan, engine: str, texts: int) -> list[Figure]:
    """Tokens per second of so many texts at once, each with a prefix of its own, from the prompt to the last token."""
    from prefixtune.training.starts.words import from_words

    source = plan.path if engine == "vllm" else plan.model
    length = PREFIX_LENGTH + PROMPT_LENGTH + plan.new + 8
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        backbone = make_backbone(source, "bfloat16", plan.device)
        prefixes = [from_words(backbone, f"Describe number {index}:", PREFIX_LENGTH) for index in range(texts)]
        reset_peak_memory(plan.device)
        if engine == "vllm":
            save_prefixes(Path(folder), backbone, prefixes)
            del backbone
            words = ["serve", "--engine", "vllm", "--vllm-python", plan.vllm_python, "--backbone", source]
            words += ["--backbone-id", "m", "--prefixes", folder, "--dtype", "bfloat16", "--port", "{port}"]
            words += ["--max-length", str(length), "--num-slots", str(texts), "--train-workers", "0"]
            server = Server("vllm", [sys.executable, "-m", "prefixtune", *words], SRC)
            stack.callback(server.close)
            answer = over_http(server, {"max_tokens": plan.new, "min_tokens": plan.new}, texts)
        else:
            answer = in_process(backbone, prefixes, texts, plan.new, length)
        draw, speeds = random.Random(texts), []
        for number in range(plan.repeats + 1):
            prompts = [[draw.randrange(3, 256) for _ in range(PROMPT_LENGTH)] for _ in range(texts)]
            done = answer(prompts, number)
            speeds.append(done.tokens / done.seconds)
    name = f"{plan.model}, {texts} at once: {engine}"
    figures = [Figure("decode", name, median(speeds[1:]), "tokens/s")]
    return figures if engine == "vllm" else figures + _device_memory(plan, "decode", name)


def prompt(plan: Plan) -> list[Figure]:
    """Peak memory above the weights, and seconds, of one long prompt with a prefix."""
    from prefixtune.engine.config import EngineConfig
    from prefixtune.engine.engine import TorchEngine
    from prefixtune.engine.request import Request, SamplingParams
    from prefixtune.training.starts.words import from_words

    backbone = make_backbone(plan.model, "bfloat16", plan.device)
    room = backbone.max_positions_with(PREFIX_LENGTH)
    length = plan.prompt if room is None else min(plan.prompt, room - 8)
    prefix, draw = from_words(backbone, "Describe:", PREFIX_LENGTH), random.Random(0)
    ids = tuple(draw.randrange(3, 256) for _ in range(length))
    reset_peak_memory(plan.device)
    loaded, began = memory_mib(plan.device) or 0.0, time.perf_counter()
    positions = length + PREFIX_LENGTH + 8
    # Room for this prompt, and not for as much as there is.
    room_mib = cache_mib(backbone, 1, positions)
    engine = TorchEngine(backbone, EngineConfig(num_slots=1, max_length=positions, kv_cache_mib=room_mib))
    [[output]] = engine.run([Request(ids, prefix, SamplingParams(max_new_tokens=1))])
    wait(plan.device)
    name = f"{plan.model}, {length:,} tokens"
    if output.error:
        return [Figure("prompt", name, None, reason=output.error)]
    peak = (memory_mib(plan.device, peak=True) or 0.0) - loaded
    return [
        Figure("prompt", f"{name}: first token", time.perf_counter() - began, "s"),
        Figure("prompt", f"{name}: peak above the weights", peak, "MiB"),
    ]


def save(plan: Plan, folder: Path) -> str:
    """Files of a model: SmolLM2's own; of a random one in this folder, in bfloat16."""
    return str(save_model(plan.model, folder, "bfloat16", plan.device)) if plan.model in SHAPES else plan.model


def _device_memory(plan: Plan, part: str, name: str) -> list[Figure]:
    peak = memory_mib(plan.device, peak=True)
    return [Figure(part, f"{name}, {plan.device}, peak memory", peak, "MiB", reason="unknown here")]


def _reason(error: BaseException) -> str:
    if isinstance(error, BrokenProcessPool):
        return "its process was ended"
    return "out of memory" if is_out_of_memory(error) else first_line(error)[:200]


# --- all of it --------------------------------------------------------------------------------------------------------


def measure_model(plan: Plan, parts: list[str], log: Log) -> list[Figure]:
    """All parts of one model."""
    figures: list[Figure] = []

    def attempt(part: str, what: str, work: Callable[..., list[Figure]], *arguments: object) -> None:
        name = f"{plan.model}: {what}"
        if part not in parts:
            return
        try:
            found = isolated(work, *arguments)
        except Exception as error:
            found = [Figure(part, name, None, reason=_reason(error))]
        figures.extend(found)
        log(f"{part}, {name}: {'; '.join(figure.shown() for figure in found)}")

    with tempfile.TemporaryDirectory(prefix="prefixtune-gpu-") as name:
        try:
            plan = replace(plan, path=isolated(save, plan, Path(name)))
        except Exception as error:
            figures.append(Figure("load", f"{plan.model}: files", None, reason=_reason(error)))
        if plan.path:
            attempt("load", "as it is", load, plan, "")
            attempt("load", "int8", load, plan, "int8")
        attempt("train", "prefixtune", train, plan, "prefixtune")
        attempt("train", "PEFT", train, plan, "PEFT")
        for texts in plan.texts:
            attempt("decode", f"{texts} at once, engine", decode, plan, "engine", texts)
            if plan.vllm_python and plan.path:
                attempt("decode", f"{texts} at once, vllm", decode, plan, "vllm", texts)
        if not plan.vllm_python and "decode" in parts:
            figures.append(Figure("decode", f"{plan.model}: vllm", None, reason="no --vllm-python was named"))
        attempt("prompt", "a long prompt", prompt, plan)
    return figures + speed_ratios(figures)


def speed_ratios(figures: list[Figure]) -> list[Figure]:
    """How many times as many target tokens a second prefixtune trains as PEFT."""
    speeds = {figure.name: figure.value for figure in figures if figure.unit == "target tokens/s"}
    ratios = []
    for name, ours in speeds.items():
        theirs = speeds.get(name.replace("prefixtune", "PEFT"))
        if name.endswith("prefixtune") and ours and theirs:
            ratios.append(Figure("train", f"{name} / PEFT, speed", ours / theirs, "x"))
    return ratios


def measure(options: argparse.Namespace, log: Log) -> Results:
    """All models.

    Raises:
        PeerError: There is no such device.
    """
    import torch

    if options.device.startswith("cuda") and not torch.cuda.is_available():
        raise PeerError(
            "there is no GPU that torch can use (--device cpu --tiny shows on a CPU that the program works)"
        )
    options.quick = options.tiny or options.quick
    if options.json == OUTPUT and (options.quick or not options.device.startswith("cuda")):
        # Nothing for the page.
        options.json = FOLDER / "latest.json"
    figures: list[Figure] = []
    for model in options.models or (["tiny"] if options.tiny else ["smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"]):
        plan = Plan(options.device, model, repeats=options.repeats, vllm_python=options.vllm_python)
        figures += measure_model(plan.tiny() if options.tiny else plan, options.parts.split(","), log)
    return {"device": options.device, "tiny": options.tiny}, figures


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and write the figures."""
    parser = make_parser(__doc__, "gpu", repeats=7)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1 or cpu (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny settings: in seconds, also on a CPU")
    parser.add_argument("--models", nargs="+", help=f"{', '.join(SHAPES)}, or as for prefixtune (default: all)")
    parser.add_argument("--parts", default="load,train,decode,prompt", help="default %(default)s")
    parser.add_argument("--vllm-python", default="", help="a Python whose environment has vLLM: its server is measured")
    return run_benchmark(parser, measure, arguments)


if __name__ == "__main__":
    sys.exit(main())
