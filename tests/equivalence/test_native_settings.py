"""Compiled code is right and stays in use whatever else the process has set or loaded."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune.attention.native.packed import packed_kernel
from prefixtune.backbone.native.gate import gate_kernel
from prefixtune.backbone.native.linear import row_kernel
from prefixtune.backbone.native.loss import loss_kernel
from prefixtune.backbone.native.norm import norm_kernel
from prefixtune.backbone.native.panels import panel_kernel
from prefixtune.backbone.native.rotation import rotation_kernel
from prefixtune.engine.native import load_kernel
from prefixtune.engine.native.decoder import decoder_kernel
from prefixtune.utils.native.build import build

KERNELS: dict[str, Callable[[], Any]] = {
    "packed_attention": lambda: packed_kernel().result(),
    "gate": lambda: gate_kernel().result(),
    "linear": lambda: row_kernel().result(),
    "loss": lambda: loss_kernel().result(),
    "norm": lambda: norm_kernel().result(),
    "panels": lambda: panel_kernel(120.0),
    "rotation": lambda: rotation_kernel().result(),
    "slot_attention": lambda: load_kernel(120.0),
    "decoder_step": lambda: decoder_kernel().result(),
}


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", KERNELS)
def test_it_is_found_right_under_any_default_dtype(name: str, dtype: torch.dtype):
    kernel = KERNELS[name]()
    if kernel is None:
        pytest.skip("not compiled on this machine")
    path = build(Path(inspect.getfile(type(kernel))).with_name(f"{name}.cpp"))
    # As while transformers builds a model in another thread.
    torch.set_default_dtype(dtype)
    assert isinstance(type(kernel)(path), type(kernel))


def test_it_shares_the_threads_of_torch():
    libraries = Path(torch.__file__).parent / "lib"
    if not any(path.name.startswith(("libgomp", "libomp", "libiomp")) for path in libraries.iterdir()):
        pytest.skip("this torch takes its OpenMP from elsewhere")
    # sentencepiece brings a copy of its own, which stands before it in the map of the process.
    code = "import torch, sentencepiece; from prefixtune.utils.native import build; print(build._find_openmp())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve().parent == libraries.resolve()
