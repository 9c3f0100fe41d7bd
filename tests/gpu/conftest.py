"""A device for each test: the CPU, where all of it is shown to work, and the GPU, where there is one."""

import pytest
import torch

from prefixtune.backbone.backbone import Backbone


def pytest_collection_modifyitems(items):
    """Mark what needs a GPU, and skip it where there is none."""
    missing = pytest.mark.skip(reason="torch finds no GPU here")
    for item in items:
        if getattr(item, "callspec", None) is not None and item.callspec.params.get("device") == "cuda":
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(missing)


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    """Each device in turn."""
    return str(request.param)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request):
    """Each dtype in turn."""
    return str(request.param)


@pytest.fixture
def placed(tiny_models, tiny_tokenizer):
    """A factory: `placed(family, device, dtype)` makes a tiny backbone there; the same numbers everywhere."""

    def make(name, device, dtype="float32", **changes):
        model = tiny_models(name, **changes).to(device, getattr(torch, dtype))
        return Backbone.from_model(model, tiny_tokenizer, f"tiny-{name}")

    return make
