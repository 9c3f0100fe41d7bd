"""Part `train`: a training step against PEFT's, in time and in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data import Data, deal, encode, to_lists
from results import Line
from sides import (
    VARIANTS,
    OurSide,
    PeftSide,
    compare,
    copy_weights,
    make_side,
    num_target_tokens,
    require_equal,
    same_backbone,
    step,
)

from prefixtune.backbone import load_backbone
from prefixtune.batching import Encoded

MEMORY_STEPS = 3

SPEED_RATIOS = [("ours-fp32", "peft-fp32", 2.5), ("ours-bf16", "peft-fp32", 4.0), ("ours-bf16", "peft-bf16", None)]
MEMORY_RATIOS = [("ours-fp32", "peft-fp32", 0.7), ("ours-bf16", "peft-fp32", 0.7), ("ours-bf16", "peft-bf16", None)]

Say = Callable[[str], None]


def name(variant: str) -> str:
    library, dtype = VARIANTS[variant]
    return f"{library} {dtype.replace('float', 'fp').replace('bfp', 'bf')}"


def run(
    data: Data,
    *,
    backbone_name: str,
    settings: list[tuple[int, int]],
    repeats: int,
    prefix_length: int,
    seed: int,
    say: Say,
) -> tuple[dict[str, Any], list[Line]]:
    """Measure every setting (pairs per step, most targets of one source)."""
    backbone = load_backbone(backbone_name, dtype="float32", device="cpu")
    encoded = encode(backbone, data, prefix_length)
    # One batch more, to warm up on.
    dealt = {
        (size, most): deal(encoded, batch_size=size, targets_per_source=most, number=repeats + 1, seed=seed)
        for size, most in settings
    }
    del backbone, encoded
    gc.collect()
    found: list[dict[str, Any]] = []
    # Memory first: this process is small now, and leaves the machine's memory to its children.
    memory = {
        setting: {
            variant: measure_memory(variant, batches[: MEMORY_STEPS + 1], backbone_name, prefix_length, say)
            for variant in VARIANTS
        }
        for setting, batches in dealt.items()
    }
    sides = {variant: make_side(variant, prefix_length, backbone_name) for variant in VARIANTS}
    same_backbone(sides["peft-fp32"], sides["ours-fp32"])
    same_backbone(sides["peft-bf16"], sides["ours-bf16"])
    lines: list[Line] = []
    for (batch_size, targets_per_source), batches in dealt.items():
        say(f"training step: {batch_size} pairs, up to {targets_per_source} targets of a source")
        result = {
            "batch_size": batch_size,
            "targets_per_source": targets_per_source,
            "differences_in_float32": require_equal(sides["peft-fp32"], sides["ours-fp32"], batches[0]),
            "differences_of_bfloat16": {
                variant: compare(sides["peft-fp32"], sides[variant], batches[0])
                for variant in ("peft-bf16", "ours-bf16")
            },
            **measure_time(sides, batches, say),
            "memory": memory[batch_size, targets_per_source],
        }
        found.append(result)
        lines += report(result)
    facts = {
        "prefix_length": prefix_length,
        "trained_parameters": sum(weight.numel() for weight in sides["ours-fp32"].weights()),
        "peft_prompt_encoder_dtype": {
            v: str(sides[v].weights()[0].dtype).removeprefix("torch.") for v in ("peft-fp32", "peft-bf16")
        },
        "peft_attention": sides["peft-fp32"].model.config._attn_implementation,
    }
    return {**facts, "settings": found}, lines


def measure_time(sides: dict[str, PeftSide | OurSide], batches: list[list[Encoded]], say: Say) -> dict[str, Any]:
    """Let all sides take the same steps in turn, A B C D, D C B A, ...; the first batch warms up."""
    first = sides["peft-fp32"]
    for side in sides.values():
        if side is not first:
            copy_weights(first, side)
        side.optimizer.state.clear()
    order = list(sides)
    seconds: dict[str, list[float]] = {variant: [] for variant in sides}
    losses: dict[str, list[float]] = {variant: [] for variant in sides}
    for number, batch in enumerate(batches):
        for variant in order if number % 2 else reversed(order):
            gc.collect()
            began = time.perf_counter()
            loss = step(sides[variant], batch)
            taken = time.perf_counter() - began
            if number:
                seconds[variant].append(taken)
                losses[variant].append(loss)
        if number:
            say(f"  {number}/{len(batches) - 1}: " + ", ".join(f"{v} {s[-1]:.2f} s" for v, s in seconds.items()))
    timed = batches[1:]
    tokens = [num_target_tokens(batch) for batch in timed]
    return {
        "target_tokens": tokens,
        "positions": {
            "PEFT": [sides["peft-fp32"].positions(batch) for batch in timed],
            "prefixtune": [sides["ours-fp32"].positions(batch) for batch in timed],
        },
        "seconds": seconds,
        "losses": losses,
        "tokens_per_second": {
            variant: median(n / s for n, s in zip(tokens, taken, strict=True)) for variant, taken in seconds.items()
        },
        "speed_ratios": {
            f"{ours} / {theirs}": [b / a for a, b in zip(seconds[ours], seconds[theirs], strict=True)]
            for ours, theirs, _ in SPEED_RATIOS
        },
    }


def measure_memory(
    variant: str, batches: list[list[Encoded]], backbone_name: str, prefix_length: int, say: Say
) -> dict[str, float]:
    """Peak memory of a variant, in a process of its own.

    Raises:
        RuntimeError: The process failed; with what it said.
    """
    job = {
        "variant": variant,
        "backbone": backbone_name,
        "prefix_length": prefix_length,
        "threads": torch.get_num_threads(),
        "batches": to_lists(batches),
    }
    script = Path(__file__).with_name("memory.py")
    done = subprocess.run([sys.executable, str(script)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout)
    say(f"memory of {name(variant)}: peak {found['peak_mib']:,.0f} MiB")
    return found


def report(result: dict[str, Any]) -> list[Line]:
    """A setting's lines of the table."""
    title = f"{result['batch_size']} pairs, <= {result['targets_per_source']} per source"
    lines = [Line("train", f"{title}: largest difference in fp32", max(result["differences_in_float32"].values()))]
    for library, positions in result["positions"].items():
        lines.append(Line("train", f"{title}: {library}, positions per step", median(positions)))
    for variant, speed in result["tokens_per_second"].items():
        lines.append(Line("train", f"{title}: {name(variant)}", speed, "target tokens/s"))
    for ours, theirs, goal in SPEED_RATIOS:
        value = median(result["speed_ratios"][f"{ours} / {theirs}"])
        lines.append(Line("train", f"{title}: {name(ours)} / {name(theirs)}, speed", value, "x", at_least=goal))
    for variant, memory in result["memory"].items():
        lines.append(Line("train", f"{title}: {name(variant)}, peak memory", memory["peak_mib"], "MiB"))
        if memory["step_mib"] is not None:
            lines.append(Line("train", f"{title}: {name(variant)}, above the loaded model", memory["step_mib"], "MiB"))
    result["memory_ratios"], result["step_memory_ratios"] = {}, {}
    for ours, theirs, goal in MEMORY_RATIOS:
        pair = f"{name(ours)} / {name(theirs)}"
        peak, above = (_ratio(result["memory"], ours, theirs, key) for key in ("peak_mib", "step_mib"))
        result["memory_ratios"][f"{ours} / {theirs}"] = peak
        result["step_memory_ratios"][f"{ours} / {theirs}"] = above
        lines.append(Line("train", f"{title}: {pair}, peak memory", peak, "x", at_most=goal))
        if above is not None:
            lines.append(Line("train", f"{title}: {pair}, above the loaded model", above, "x"))
    return lines


def _ratio(memory: dict[str, Any], ours: str, theirs: str, key: str) -> float | None:
    one, other = memory[ours][key], memory[theirs][key]
    return None if one is None or not other else one / other
