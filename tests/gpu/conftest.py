"""A device for each test: the CPU, where all of it is shown to work, and the GPU, where there is one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefixtune.backbone.backbone import Backbone


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what needs a GPU, and skip it where there is none."""
    missing = pytest.mark.skip(reason="torch finds no GPU here")
    for item in items:
        if getattr(item, "callspec", None) is not None and item.callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn."""
    return str(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    """Each dtype in turn."""
    return str(request.param)


@pytest.fixture
def placed(tiny_models: Callable[..., Any], tiny_tokenizer: Any) -> Callable[..., Backbone]:
    """A factory: `placed(family, device, dtype)` makes a tiny backbone there; the same numbers everywhere."""

    def make(name: str, device: str, dtype: str = "float32", **changes: Any) -> Backbone:
        model = tiny_models(name, **changes).to(device, getattr(torch, dtype))
        return Backbone.from_model(model, tiny_tokenizer, f"tiny-{name}")

    return make
