"""docs/scale.md is current, and its simulation computes what it says."""

from __future__ import annotations

import pytest

from tools import scale_page


def test_the_page_is_up_to_date() -> None:
    assert scale_page.PAGE.read_text(encoding="utf-8") == scale_page.page(), "run `python -m tools.scale_page`"


def test_a_prefix_takes_what_its_tensors_take() -> None:
    # GPT-2 Medium, P = 10: 24 layers, keys and values, 16 heads of 64, 2 bytes each.
    (medium,) = [model for model in scale_page.MODELS if model.name == "GPT-2 Medium"]
    assert medium.position_bytes * 10 == 24 * 2 * 16 * 64 * 10 * 2


def test_a_cache_for_all_misses_once_a_task_and_replica(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_page, "TASKS", 5)
    monkeypatch.setattr(scale_page, "REQUESTS", 4000)
    assert scale_page.simulate(lambda task, draw: 0, capacity=5) == 1.0
    # A cache of one prefix: a hit only where a task comes twice in a row, which for five tasks by Zipf's law is
    # the sum of their squared shares, 0.281.
    assert scale_page.simulate(lambda task, draw: 0, capacity=1) == pytest.approx(0.281, abs=0.03)
