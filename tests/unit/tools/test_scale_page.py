"""docs/scale.md is what its script works out; and the script works out what it says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[3] / "docs" / "scale.py"


@pytest.fixture(scope="module")
def scale() -> Any:
    spec = importlib.util.spec_from_file_location("scale", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["scale"] = module
    spec.loader.exec_module(module)
    return module


def test_the_page_is_up_to_date(scale: Any) -> None:
    assert scale.PAGE.read_text(encoding="utf-8") == scale.page(), "run `python docs/scale.py`"


def test_a_prefix_takes_what_its_tensors_take(scale: Any) -> None:
    # GPT-2 Medium, P = 10: 24 layers, keys and values, 16 heads of 64, 2 bytes each.
    (medium,) = [model for model in scale.MODELS if model.name == "GPT-2 Medium"]
    assert medium.position_bytes * 10 == 24 * 2 * 16 * 64 * 10 * 2


def test_a_cache_for_all_misses_once_a_task_and_replica(scale: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale, "TASKS", 5)
    monkeypatch.setattr(scale, "REQUESTS", 4000)
    assert scale.simulate(lambda task, draw: 0, capacity=5) == 1.0
    # One place in the cache: a hit only where a task comes twice in a row, which for five tasks by Zipf's law is
    # the sum of their squared shares, 0.281.
    assert scale.simulate(lambda task, draw: 0, capacity=1) == pytest.approx(0.281, abs=0.03)
