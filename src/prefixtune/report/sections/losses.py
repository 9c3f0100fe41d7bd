"""Losses over a run's steps: as points, smoothed, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.utils.files import atomic_path

__all__ = ["limits", "loss_plot", "points", "smooth"]


RAW, SMOOTH, DEVELOPMENT = "#a9c6e8", "#1f5fa8", "#d1495b"


def loss_plot(events: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draw training and development loss over the steps, and save the picture as PNG.

    Losses that are not finite are left out, and of a step that was done twice (after resuming) the later one counts.

    Args:
        events: Of these, `{"event": "step", "step": 1, "loss": 3.2}` gives the training loss and
            `{"event": "evaluation", "step": 50, "loss": 2.1}` the development loss; others are ignored.
        path: The PNG file, written atomically.
        title: Above the picture.

    Raises:
        PrefixError: The file cannot be written.
    """
    from matplotlib.figure import Figure  # without pyplot: no window system, no global state
    from matplotlib.ticker import MaxNLocator

    steps, losses = points(events, "step")
    dev_steps, dev_losses = points(events, "evaluation")
    smoothed = smooth(losses)

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot()
    if losses:
        axes.plot(steps, losses, color=RAW, linewidth=0.8, label="training")
        axes.plot(steps, smoothed, color=SMOOTH, linewidth=1.8, label="training, smoothed")
    if dev_losses:
        axes.plot(dev_steps, dev_losses, color=DEVELOPMENT, linewidth=1, marker="o", markersize=5, label="development")
        best = min(range(len(dev_losses)), key=dev_losses.__getitem__)
        axes.annotate(
            f"{dev_losses[best]:.3g}",
            (dev_steps[best], dev_losses[best]),
            textcoords="offset points",
            xytext=(0, -14),
            ha="center",
            color=DEVELOPMENT,
        )
    if losses or dev_losses:
        axes.set_ylim(*limits(losses, [*smoothed, *dev_losses]))
        axes.legend(frameon=False)
    else:
        axes.text(0.5, 0.5, "no losses recorded", ha="center", va="center", transform=axes.transAxes, color="gray")
    axes.set_title(title.replace("$", r"\$"), wrap=True)  # a dollar sign would start a formula
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})  # equal runs give equal files


def smooth(values: Sequence[float]) -> list[float]:
    """Average each value with those before it, nearer ones with more weight; over about a twentieth of the run.

    The weights always sum to one, so the line starts at the first value and not at zero.

    >>> smooth([4.0, 4.0, 4.0])
    [4.0, 4.0, 4.0]
    >>> smooth([])
    []
    """
    keep = 1 - 1 / max(2.0, len(values) / 20)
    result, total, weight = [], 0.0, 0.0
    for value in values:
        total, weight = keep * total + value, keep * weight + 1
        result.append(total / weight)
    return result


def points(events: Sequence[Mapping[str, Any]], kind: str, key: str = "loss") -> tuple[list[int], list[float]]:
    """Steps and losses of one kind of event.

    Losses that are missing or not finite are left out, and of a step that was done twice the later one counts.
    """
    losses: dict[int, float] = {}
    for event in events:
        step, loss = event.get("step"), event.get(key)
        if event.get("event") == kind and step is not None and loss is not None and math.isfinite(loss):
            losses[int(step)] = float(loss)
    steps = sorted(losses)
    return steps, [losses[step] for step in steps]


def limits(raw: Sequence[float], must_show: Sequence[float]) -> tuple[float, float]:
    """The range of the vertical axis; the highest 2 % of the raw losses may lie outside."""
    inner = sorted(raw)[: max(1, math.ceil(0.98 * len(raw)))]
    low, high = min([*raw, *must_show]), max([*inner, *must_show])
    margin = 0.08 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
