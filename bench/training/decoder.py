"""Part `train`: a training step against PEFT's, in time and in memory."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import torch

from bench.data import Batch, Data, encode, first_batches, to_lists
from bench.results import Figure, Log, Results
from bench.training.interleave import Goal, Step, interleave, setting_figures
from bench.training.sides import (
    RECOMPUTED,
    VARIANTS,
    OurSide,
    PeftSide,
    compare,
    copy_weights,
    make_side,
    num_target_tokens,
    require_equal,
    require_same_backbone,
)
from bench.training.steps import clone_weights, set_weights, timed_step
from prefixtune.backbone.load import load_backbone

ROOT = Path(__file__).resolve().parents[2]

MEMORY_STEPS = 3

CHECKPOINTED = tuple(f"{variant}{RECOMPUTED}" for variant in ("ours-fp32", "ours-bf16"))
"""Only their memory is measured: gradient checkpointing costs time."""

_PAIRS = (("ours-fp32", "peft-fp32"), ("ours-bf16", "peft-fp32"), ("ours-bf16", "peft-bf16"))
_SPEED_GOALS = {16: (2.6, 4.8, 3.2), 32: (3.1, 5.6, 3.5)}
"""Pairs per step -> the ratios to reach."""
MEMORY_RATIOS: list[Goal] = [
    ("ours-fp32", "peft-fp32", 0.7),
    ("ours-bf16", "peft-fp32", 0.7),
    ("ours-bf16", "peft-bf16", None),
    *((variant, variant.removesuffix(RECOMPUTED), None) for variant in CHECKPOINTED),
]


def speed_ratios(batch_size: int) -> list[Goal]:
    """The sides that are compared, and the ratios to reach with so many pairs per step."""
    goals = _SPEED_GOALS.get(batch_size, (None, None, None))
    return [(one, other, goal) for (one, other), goal in zip(_PAIRS, goals, strict=True)]


def variant_name(variant: str) -> str:
    """A variant's name in the table."""
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
    log: Log,
) -> Results:
    """Measure every setting (pairs per step, most targets of one source)."""
    batches_of = prepare_batches(data, backbone_name, settings, repeats, prefix_length, seed)
    # Memory first: this process is small now, and leaves the machine's memory to its children.
    memory = {
        setting: {
            variant: measure_memory(variant, batches[: MEMORY_STEPS + 1], backbone_name, prefix_length, log)
            for variant in (*VARIANTS, *CHECKPOINTED)
        }
        for setting, batches in batches_of.items()
    }
    sides = {variant: make_side(variant, prefix_length, backbone_name) for variant in VARIANTS}
    require_same_backbone(sides["peft-fp32"], sides["ours-fp32"])
    require_same_backbone(sides["peft-bf16"], sides["ours-bf16"])
    start = clone_weights(sides["peft-fp32"])
    results: list[dict[str, Any]] = []
    figures: list[Figure] = []
    for setting, batches in batches_of.items():
        # Every setting starts from the same weights: after some steps gradients can be small sums of large numbers.
        set_weights(sides["peft-fp32"], start)
        results.append({**measure_setting(sides, setting, batches, log), "memory": memory[setting]})
        figures += report(results[-1])
    facts = {
        "prefix_length": prefix_length,
        "trained_parameters": sum(weight.numel() for weight in sides["ours-fp32"].weights()),
        "peft_prompt_encoder_dtype": {
            variant: str(sides[variant].weights()[0].dtype).removeprefix("torch.")
            for variant in ("peft-fp32", "peft-bf16")
        },
        "peft_attention": sides["peft-fp32"].model.config._attn_implementation,
    }
    return {**facts, "settings": results}, figures


def prepare_batches(
    data: Data, backbone_name: str, settings: list[tuple[int, int]], repeats: int, prefix_length: int, seed: int
) -> dict[tuple[int, int], list[Batch]]:
    """The batches of every setting, one more than `repeats` to warm up on; the backbone's memory is freed again."""
    backbone = load_backbone(backbone_name, dtype="float32", device="cpu")
    examples = encode(backbone, data, prefix_length)
    batches = {
        (batch_size, most): first_batches(
            examples, batch_size=batch_size, targets_per_source=most, num_batches=repeats + 1, seed=seed
        )
        for batch_size, most in settings
    }
    del backbone, examples
    gc.collect()
    return batches


def measure_setting(
    sides: dict[str, PeftSide | OurSide], setting: tuple[int, int], batches: list[Batch], log: Log
) -> dict[str, Any]:
    """Differences between the sides, and their times.

    Raises:
        DifferenceError: In float32 they differ by more than rounding.
    """
    batch_size, targets_per_source = setting
    reference = sides["peft-fp32"]
    assert isinstance(reference, PeftSide)
    log(f"training step: {batch_size} pairs, up to {targets_per_source} targets of a source")
    return {
        "batch_size": batch_size,
        "targets_per_source": targets_per_source,
        "differences_in_float32": require_equal(reference, sides["ours-fp32"], batches[0]),
        "differences_of_bfloat16": {
            variant: compare(reference, sides[variant], batches[0]) for variant in ("peft-bf16", "ours-bf16")
        },
        **measure_time(sides, batches, speed_ratios(batch_size), log),
    }


def measure_time(
    sides: dict[str, PeftSide | OurSide], batches: list[Batch], ratios: list[Goal], log: Log
) -> dict[str, Any]:
    """Run the same steps on all sides in turn, from the same weights."""
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
        **interleave(steps_of(sides, batches), [num_target_tokens(batch) for batch in batches], ratios, log),
    }


def steps_of(sides: Mapping[str, PeftSide | OurSide], batches: list[Batch]) -> dict[str, Step]:
    """The timed steps of sides in this process, for `interleave`."""

    def step_of(side: PeftSide | OurSide) -> Step:
        return lambda index: timed_step(side, batches[index])

    return {variant: step_of(side) for variant, side in sides.items()}


def measure_memory(
    variant: str, batches: list[Batch], backbone_name: str, prefix_length: int, log: Log
) -> dict[str, float]:
    """Peak memory of a variant, in a process of its own.

    Raises:
        RuntimeError: The process failed; with its messages.
    """
    job = {
        "variant": variant,
        "backbone": backbone_name,
        "prefix_length": prefix_length,
        "threads": torch.get_num_threads(),
        "batches": to_lists(batches),
    }
    command = [sys.executable, "-m", "bench.training.memory"]
    done = subprocess.run(command, cwd=ROOT, input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {variant} failed:\n{done.stderr}")
    memory: dict[str, float] = json.loads(done.stdout)
    log(f"memory of {variant_name(variant)}: peak {memory['peak_mib']:,.0f} MiB")
    return memory


def report(result: dict[str, Any]) -> list[Figure]:
    """A setting's lines of the table."""
    title = f"{result['batch_size']} pairs, <= {result['targets_per_source']} per source"
    figures = [Figure("train", f"{title}: largest difference in fp32", max(result["differences_in_float32"].values()))]
    for library, positions in result["positions"].items():
        figures.append(Figure("train", f"{title}: {library}, positions per step", median(positions)))
    names = {variant: variant_name(variant) for variant in (*VARIANTS, *CHECKPOINTED)}
    return figures + setting_figures("train", title, result, names, speed_ratios(result["batch_size"]), MEMORY_RATIOS)
