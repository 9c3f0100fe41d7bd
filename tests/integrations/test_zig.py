"""The compiled code, by the compiler that pip installs where a machine has none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.backbone.native import linear, norm, panels
from prefixtune.engine.native import kernel
from prefixtune.utils.native import build

pytest.importorskip("ziglang")

SOURCES: list[tuple[Path, Callable[[Path], Any]]] = [
    (kernel.SOURCE, kernel.AttentionKernel),
    (Path(linear.__file__).with_name("linear.cpp"), linear.RowKernel),
    (Path(norm.__file__).with_name("norm.cpp"), norm.NormKernel),
]


@pytest.fixture
def no_other_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    which = shutil.which
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None if "+" in name else which(name))


@pytest.mark.usefixtures("no_other_compiler")
@pytest.mark.parametrize(("source", "load"), SOURCES, ids=lambda value: getattr(value, "stem", ""))
def test_pips_compiler_serves_where_there_is_no_other(source: Path, load: Callable[[Path], Any], tmp_path: Path):
    # Loading compares results with torch's.
    load(build.build(source, tmp_path / "native"))
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]


@pytest.mark.usefixtures("no_other_compiler")
@pytest.mark.skipif(not panels._gains(), reason="the processor has no products of bfloat16")
def test_panels_by_pips_compiler(tmp_path: Path):
    panels.PanelKernel(build.build(panels.SOURCE, tmp_path / "native"))
