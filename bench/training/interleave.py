"""Sides that take their steps in turn, and what is told of it: speeds, peak memory, paired ratios.

Knows nothing of what a side is: it is asked for a step on a batch, by the batch's number.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from results import Line

Say = Callable[[str], None]
Step = Callable[[int], tuple[float, float]]
"""The number of a batch -> seconds and loss of an optimizer step on it."""
Goal = tuple[str, str, float | None]
"""Which side, divided by which other side, should reach what; None: no goal."""


def take_turns(
    steps: Mapping[str, Step], tokens: Sequence[int], speed_ratios: Sequence[Goal], say: Say
) -> dict[str, Any]:
    """Let all sides take the same steps in turn, A B C D, D C B A, ...; the first batch warms up.

    Args:
        steps: Every side.
        tokens: The target tokens of each batch.
        speed_ratios: Pairs to compare.
        say: Told how it goes.
    """
    order = list(steps)
    seconds: dict[str, list[float]] = {side: [] for side in steps}
    losses: dict[str, list[float]] = {side: [] for side in steps}
    for number in range(len(tokens)):
        for side in order if number % 2 else reversed(order):
            taken, loss = steps[side](number)
            if number:
                seconds[side].append(taken)
                losses[side].append(loss)
        if number:
            say(f"  {number}/{len(tokens) - 1}: " + ", ".join(f"{v} {s[-1]:.2f} s" for v, s in seconds.items()))
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


def tell(
    part: str,
    title: str,
    result: dict[str, Any],
    names: Mapping[str, str],
    speed_ratios: Sequence[Goal],
    memory_ratios: Sequence[Goal],
) -> list[Line]:
    """The table's lines of a setting; puts the ratios of memory into the result.

    Args:
        part: The part's name.
        title: The setting's name.
        result: What `take_turns` found; `memory` by side; and, where a side is missing, the reason in `not_measured`.
        names: What each side is called; a side may be measured in memory alone.
        speed_ratios: Pairs to compare, and goals.
        memory_ratios: The same.
    """
    missing: Mapping[str, str] = result.get("not_measured", {})
    lines = []
    for side, name in names.items():
        if side in missing:
            lines.append(Line(part, f"{title}: {name}", None, reason=missing[side]))
        elif side in result["tokens_per_second"]:
            lines.append(Line(part, f"{title}: {name}", result["tokens_per_second"][side], "target tokens/s"))
    for one, other, goal in speed_ratios:
        if not {one, other} & missing.keys():
            value = median(result["speed_ratios"][f"{one} / {other}"])
            lines.append(Line(part, f"{title}: {names[one]} / {names[other]}, speed", value, "x", at_least=goal))
    for side, memory in result["memory"].items():
        lines.append(Line(part, f"{title}: {names[side]}, peak memory", memory["peak_mib"], "MiB"))
        if memory["step_mib"] is not None:
            lines.append(Line(part, f"{title}: {names[side]}, above the loaded model", memory["step_mib"], "MiB"))
    result["memory_ratios"], result["step_memory_ratios"] = {}, {}
    for one, other, goal in memory_ratios:
        if {one, other} & missing.keys():
            continue
        pair = f"{names[one]} / {names[other]}"
        peak, above = (_ratio(result["memory"], one, other, key) for key in ("peak_mib", "step_mib"))
        result["memory_ratios"][f"{one} / {other}"] = peak
        result["step_memory_ratios"][f"{one} / {other}"] = above
        lines.append(Line(part, f"{title}: {pair}, peak memory", peak, "x", at_most=goal))
        if above is not None:
            lines.append(Line(part, f"{title}: {pair}, above the loaded model", above, "x"))
    return lines


def _ratio(memory: dict[str, Any], one: str, other: str, key: str) -> float | None:
    first, second = memory[one][key], memory[other][key]
    return None if first is None or not second else first / second
