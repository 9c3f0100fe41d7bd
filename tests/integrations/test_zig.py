"""All compiled code, by the compiler that pip installs where a machine has none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from compiled_code import LIBRARIES, SOURCES, skip_where_it_gains_nothing
from prefixtune.utils.native import build

pytest.importorskip("ziglang")


def test_every_source_is_here() -> None:
    assert SOURCES.keys() == LIBRARIES.keys()


@pytest.mark.parametrize("name", LIBRARIES)
def test_pips_compiler_serves_where_there_is_no_other(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    skip_where_it_gains_nothing(name)
    which = shutil.which
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda program: None if "+" in program else which(program))
    # Loading compares results with torch's.
    LIBRARIES[name](build.build(SOURCES[name], tmp_path / "native"))
    assert [path.suffix for path in (tmp_path / "native").iterdir()] == [".so"]
