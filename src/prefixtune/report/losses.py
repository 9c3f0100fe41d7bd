"""The losses of one run as a picture, for a command that has no page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prefixtune.pages.document import Chart, Table
from prefixtune.pages.figures import COLORS, QUIET, draw, matplotlib_style
from prefixtune.report.sections.charts import run_series
from prefixtune.utils.files import atomic_path

__all__ = ["loss_plot"]


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
    series = run_series(events)
    with matplotlib_style(), atomic_path(path) as temporary:
        figure = draw(Chart("", "", series, "optimizer step", "loss", Table("", [])))
        (axes,) = figure.axes
        axes.set_title("", loc="left")
        axes.set_title(title, wrap=True)
        axes.set_ylabel("loss")
        for each in series:
            if each.name == "development":
                best = min(each.points, key=lambda point: point[1])
                note = {"textcoords": "offset points", "xytext": (0, 9), "ha": "center", "color": COLORS[1]}
                axes.annotate(f"{best[1]:.3g}", best, **note)
        if not series:
            axes.text(0.5, 0.5, "no losses recorded", ha="center", va="center", transform=axes.transAxes, color=QUIET)
        figure.set_size_inches(8, 4.5)
        figure.savefig(temporary, format="png", dpi=120, metadata={"Software": None})  # equal runs give equal files
