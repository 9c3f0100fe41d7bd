"""Sides that take turns, so that a slow minute of the machine hits them all; and work in a process of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, TypeVar

from bench.results import Figure, Log

Pair = tuple[str, str]
"""A side, and the side to compare it with."""

S = TypeVar("S", bound=Hashable)
T = TypeVar("T")


def take_turns(sides: Sequence[S], rounds: int, run: Callable[[S, int], float], log: Log) -> dict[S, list[float]]:
    """Seconds of each side in each round, in turn A B C, C B A, ...; a first round warms up.

    Args:
        sides: What takes turns.
        rounds: That are timed.
        run: A side and the number of the round (0: warms up) -> seconds.
        log: Shows the progress.
    """
    seconds: dict[S, list[float]] = {side: [] for side in sides}
    for index in range(rounds + 1):
        for side in sides if index % 2 else reversed(sides):
            taken = run(side, index)
            if index:
                seconds[side].append(taken)
        if index:
            log(f"  {index}/{rounds}: " + ", ".join(f"{side} {taken[-1]:.2f} s" for side, taken in seconds.items()))
    return seconds


def speed_ratios(seconds: Mapping[str, Sequence[float]], pairs: Sequence[Pair]) -> dict[str, list[float]]:
    """How many times as fast one side is as another, in each round; of the pairs that ran."""
    return {
        f"{one} / {other}": [b / a for a, b in zip(seconds[one], seconds[other], strict=True)]
        for one, other in pairs
        if {one, other} <= seconds.keys()
    }


def ratio_figures(
    part: str, title: str, names: Mapping[str, str], ratios: Mapping[str, Sequence[float]], pairs: Sequence[Pair]
) -> list[Figure]:
    """The table's lines of `speed_ratios`."""
    figures = []
    for one, other in pairs:
        name, found = f"{title}{names[one]} / {names[other]}, speed", ratios.get(f"{one} / {other}")
        figures.append(Figure(part, name, median(found) if found else None, "x", reason="left out"))
    return figures


def isolated(work: Callable[..., T], *arguments: Any) -> T:
    """What a function returns in a new process, whose memory is its own.

    Raises:
        BrokenProcessPool: The process was ended, perhaps as memory was lacking.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()
