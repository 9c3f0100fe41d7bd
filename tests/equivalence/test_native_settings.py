"""Compiled code is right and stays in use whatever else the process has set or loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compiled_code import LIBRARIES, SOURCES, skip_where_it_gains_nothing
from prefixtune.utils.native.build import build, pip_compiler

HAS_COMPILER = bool(pip_compiler()) or any(map(shutil.which, ("g++", "c++", "clang++")))


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.skipif(not HAS_COMPILER, reason="there is no C++ compiler here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_compiler_makes_what_computes_right_under_any_default_dtype(name: str, dtype: torch.dtype):
    """Tests of kernels skip where there is none; here one that cannot be made, or is wrong, fails."""
    skip_where_it_gains_nothing(name)
    path = build(SOURCES[name])
    # As while transformers builds a model in another thread.
    torch.set_default_dtype(dtype)
    # Loading compares results with torch's.
    LIBRARIES[name](path)


def test_it_shares_the_threads_of_torch():
    libraries = Path(torch.__file__).parent / "lib"
    if not any(path.name.startswith(("libgomp", "libomp", "libiomp")) for path in libraries.iterdir()):
        pytest.skip("this torch takes its OpenMP from elsewhere")
    # sentencepiece brings a copy of its own, which stands before it in the map of the process.
    code = "import torch, sentencepiece; from prefixtune.utils.native import build; print(build._find_openmp())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert Path(done.stdout.strip()).resolve().parent == libraries.resolve()
