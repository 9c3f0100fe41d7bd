"""Time the steps of several sides in turn, and report speeds, peak memory and paired ratios."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from bench.results import Figure, Log

Step = Callable[[int], tuple[float, float]]
"""Index of a batch -> seconds and loss of an optimizer step on it."""
Goal = tuple[str, str, float | None]
"""A side, the side to divide it by, and the ratio to reach; None: no goal."""


def interleave(
    steps: Mapping[str, Step], tokens: Sequence[int], speed_ratios: Sequence[Goal], log: Log
) -> dict[str, Any]:
    """Run the same steps on all sides in turn, A B C D, D C B A, ...; the first batch warms up.

    Args:
        steps: Side -> its step.
        tokens: The target tokens of each batch.
        speed_ratios: Pairs to compare.
        log: Shows the progress.
    """
    order = list(steps)
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, list[float]] = {side: [] for side in steps}
    for index in range(len(tokens)):
        for side in order if index % 2 else reversed(order):
            taken, loss = steps[side](index)
            if index:
                seconds[side].append(taken)
                losses[side].append(loss)
        if index:
            log(f"  {index}/{len(tokens) - 1}: " + ", ".join(f"{v} {s[-1]:.2f} s" for v, s in seconds.items()))
    timed = list(tokens[1:])
    return {
        "target_tokens": timed,
        "seconds": seconds,
        "losses": losses,
        "tokens_per_second": {
            side: median(n / s for n, s in zip(timed, taken, strict=True)) for side, taken in seconds.items()
        },
        "speed_ratios": {
            f"{one} / {other}": [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
            for one, other, _ in speed_ratios
            if one in seconds and other in seconds
        },
    }


def setting_figures(
    part: str,
    title: str,
    result: dict[str, Any],
    names: Mapping[str, str],
    speed_ratios: Sequence[Goal],
    memory_ratios: Sequence[Goal],
) -> list[Figure]:
    """The table's lines of a setting; adds the ratios of memory to the result.

    Args:
        part: The part's name.
        title: The setting's name.
        result: What `interleave` returned; `memory` by side; and the reason in `not_measured` for missing sides.
        names: Side -> its name in the table; for some sides only the memory is measured.
        speed_ratios: Pairs to compare, and goals.
        memory_ratios: The same.
    """
    missing: Mapping[str, str] = result.get("not_measured", {})
    figures = []
    for side, name in names.items():
        if side in missing:
            figures.append(Figure(part, f"{title}: {name}", None, reason=missing[side]))
        elif side in result["tokens_per_second"]:
            figures.append(Figure(part, f"{title}: {name}", result["tokens_per_second"][side], "target tokens/s"))
    for one, other, goal in speed_ratios:
        if not {one, other} & missing.keys():
            value = median(result["speed_ratios"][f"{one} / {other}"])
            figures.append(Figure(part, f"{title}: {names[one]} / {names[other]}, speed", value, "x", at_least=goal))
    for side, memory in result["memory"].items():
        figures.append(Figure(part, f"{title}: {names[side]}, peak memory", memory["peak_mib"], "MiB"))
        if memory["step_mib"] is not None:
            figures.append(Figure(part, f"{title}: {names[side]}, above the loaded model", memory["step_mib"], "MiB"))
    result["memory_ratios"], result["step_memory_ratios"] = {}, {}
    for one, other, goal in memory_ratios:
        if {one, other} & missing.keys():
            continue
        pair = f"{names[one]} / {names[other]}"
        peak, above = (_ratio(result["memory"], one, other, key) for key in ("peak_mib", "step_mib"))
        result["memory_ratios"][f"{one} / {other}"] = peak
        result["step_memory_ratios"][f"{one} / {other}"] = above
        figures.append(Figure(part, f"{title}: {pair}, peak memory", peak, "x", at_most=goal))
        if above is not None:
            figures.append(Figure(part, f"{title}: {pair}, above the loaded model", above, "x"))
    return figures


def _ratio(memory: dict[str, Any], one: str, other: str, key: str) -> float | None:
    first, second = memory[one][key], memory[other][key]
    return None if first is None or not second else first / second
