"""The loss picture: what it shows is read from the figure, what it writes from the file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from prefixtune.report import loss_plot, smooth


def run(steps: int) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = [{"event": "start", "total": steps}]
    for step in range(1, steps + 1):
        events.append({"event": "step", "step": step, "loss": 3 / math.sqrt(step) + 0.3 * (step % 3), "lr": 1e-3})
        if step % 50 == 0:
            events.append({"event": "evaluation", "step": step, "loss": 2 / math.sqrt(step)})
    return [*events, {"event": "end"}]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Keep each figure that is saved."""
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def keep(self: Any, *args: Any, **options: Any) -> None:
        figures.append(self)
        save(self, *args, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def test_writes_a_readable_picture(tmp_path: Path, drawn: list[Any]) -> None:
    path = tmp_path / "new" / "loss.png"
    loss_plot(run(200), path, "E2E, P=10, costs $5 to $6")
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert [file.name for file in path.parent.iterdir()] == ["loss.png"]

    (axes,) = drawn[0].axes
    raw, smoothed, development = axes.get_lines()
    assert list(raw.get_xdata()) == list(smoothed.get_xdata()) == list(range(1, 201))
    assert list(development.get_xdata()) == [50, 100, 150, 200]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("optimizer step", "loss")
    assert axes.get_title() == "E2E, P=10, costs $5 to $6"
    assert not axes.title.get_parse_math()
    assert [text.get_text() for text in drawn[0].legends[0].get_texts()] == [
        "training",
        "training, smoothed",
        "development",
    ]


def test_resumed_steps_and_broken_losses(tmp_path: Path, drawn: list[Any]) -> None:
    losses = [(1, 3.0), (2, float("nan")), (3, 2.0), (4, float("inf")), (3, 1.0), (5, None)]
    loss_plot([{"event": "step", "step": s, "loss": v} for s, v in losses], tmp_path / "a.png", "run")
    raw = drawn[0].axes[0].get_lines()[0]
    assert list(zip(raw.get_xdata(), raw.get_ydata(), strict=True)) == [(1, 3.0), (3, 1.0)]


def test_smoothing_follows_and_calms() -> None:
    values = [3.0 + (-1) ** step for step in range(200)]
    smoothed = smooth(values)
    assert smoothed[0] == values[0]
    assert max(smoothed[-50:]) - min(smoothed[-50:]) < 0.25
    assert abs(sum(smoothed[-50:]) / 50 - 3) < 0.05
