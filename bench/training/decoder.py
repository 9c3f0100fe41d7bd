"""Part `train`: a training step against PEFT's, in time and in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import Any

import torch
from data import Data, deal, encode, to_lists
from results import Line
from sides import (
    RECOMPUTED,
    VARIANTS,
    OurSide,
    PeftSide,
    compare,
    copy_weights,
    make_side,
    num_target_tokens,
    require_equal,
    same_backbone,
)
from steps import copy_of_weights, set_weights, timed_step
from turns import Goal, Say, Step, take_turns, tell

from prefixtune.backbone.load import load_backbone
from prefixtune.data.encoding import TokenizedExample

MEMORY_STEPS = 3

CHECKPOINTED = tuple(f"{variant}{RECOMPUTED}" for variant in ("ours-fp32", "ours-bf16"))
"""Measured in memory alone: gradient checkpointing pays with time."""

SPEED_RATIOS: list[Goal] = [
    ("ours-fp32", "peft-fp32", 2.5),
    ("ours-bf16", "peft-fp32", 4.0),
    ("ours-bf16", "peft-bf16", None),
]
MEMORY_RATIOS: list[Goal] = [
    ("ours-fp32", "peft-fp32", 0.7),
    ("ours-bf16", "peft-fp32", 0.7),
    ("ours-bf16", "peft-bf16", None),
    *((variant, variant.removesuffix(RECOMPUTED), None) for variant in CHECKPOINTED),
]


def name(variant: str) -> str:
    library, dtype = VARIANTS[variant.removesuffix(RECOMPUTED)]
    recomputed = ", checkpointed" * variant.endswith(RECOMPUTED)
    return f"{library} {dtype.replace('float', 'fp').replace('bfp', 'bf')}{recomputed}"


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
            for variant in (*VARIANTS, *CHECKPOINTED)
        }
        for setting, batches in dealt.items()
    }
    sides = {variant: make_side(variant, prefix_length, backbone_name) for variant in VARIANTS}
    same_backbone(sides["peft-fp32"], sides["ours-fp32"])
    same_backbone(sides["peft-bf16"], sides["ours-bf16"])
    start = copy_of_weights(sides["peft-fp32"])
    lines: list[Line] = []
    for (batch_size, targets_per_source), batches in dealt.items():
        # Every setting begins anew: after some steps the gradients can be small sums of large numbers.
        set_weights(sides["peft-fp32"], start)
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


def measure_time(
    sides: dict[str, PeftSide | OurSide], batches: list[list[TokenizedExample]], say: Say
) -> dict[str, Any]:
    """Let all sides take the same steps in turn, from the same start."""
    first = sides["peft-fp32"]
    for side in sides.values():
        if side is not first:
            copy_weights(first, side)
        side.optimizer.state.clear()
    return {
        "positions": {
            "PEFT": [sides["peft-fp32"].positions(batch) for batch in batches[1:]],
            "prefixtune": [sides["ours-fp32"].positions(batch) for batch in batches[1:]],
        },
        **take_turns(in_turn(sides, batches), [num_target_tokens(batch) for batch in batches], SPEED_RATIOS, say),
    }


def in_turn(sides: dict[str, PeftSide | OurSide], batches: list[list[TokenizedExample]]) -> dict[str, Step]:
    """Sides of this process, as `take_turns` takes them."""
    return {variant: lambda number, side=side: timed_step(side, batches[number]) for variant, side in sides.items()}


def measure_memory(
    variant: str, batches: list[list[TokenizedExample]], backbone_name: str, prefix_length: int, say: Say
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
    names = {variant: name(variant) for variant in (*VARIANTS, *CHECKPOINTED)}
    return lines + tell("train", title, result, names, SPEED_RATIOS, MEMORY_RATIOS)
