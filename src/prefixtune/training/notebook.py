"""What a notebook shows of a run that was trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from prefixtune.training.folder import Event
from prefixtune.utils.console import format_figure, format_seconds
from prefixtune.utils.notebook import curve_svg, facts_html

__all__ = ["run_html"]


_MOST_FILES = 12


def run_html(path: Path, events: Sequence[Event], *, steps: int, best_loss: float, num_trained: int) -> str:
    """A small table and the losses as a curve: in training, and dashed on the development examples.

    Args:
        path: The artifact.
        events: Of the run.
        steps: Optimizer steps taken.
        best_loss: Lowest development loss; NaN: there are no such examples.
        num_trained: Parameters that the optimizer moved.
    """
    taken = [event for event in events if event["event"] == "step"]
    curves = {
        "training": [(event["step"], event["loss_per_token"]) for event in taken],
        "development": [
            (event["step"], event["loss"]) for event in events if event["event"] == "evaluation" and "loss" in event
        ],
    }
    seconds = sum(event["seconds"] for event in taken)
    tokens = sum(event["target_tokens"] for event in taken)
    facts = {
        "steps": f"{steps:,} in {format_seconds(seconds)}",
        "loss per token": f"{format_figure(curves['training'][-1][1])} in the last step" if taken else None,
        "development loss": None if math.isnan(best_loss) else f"{format_figure(best_loss)} at best",
        "trained": f"{num_trained:,} parameters",
        "target tokens": f"{tokens:,}, {format_figure(round(tokens / seconds))} per second" if seconds > 0 else None,
        "artifact": path,
        "files beside it": _list_files(path.parent),
    }
    return facts_html("Training run", facts, below=curve_svg(curves, label="loss per token by step"))


def _list_files(folder: Path) -> str:
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError:
        return ""
    more = f" and {len(names) - _MOST_FILES} more" if len(names) > _MOST_FILES else ""
    return ", ".join(names[:_MOST_FILES]) + more
