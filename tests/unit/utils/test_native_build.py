"""Files of compiled code: old ones are removed, whatever other processes do with them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefixtune.utils.native.build import _KEPT, _remove_old


def test_old_files_that_another_process_removes_meanwhile_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [tmp_path / f"norm-{number}.so" for number in range(_KEPT + 3)]
    for age, path in enumerate(files):
        path.touch()
        os.utime(path, (1000 - age, 1000 - age))
    (tmp_path / "other-1.so").touch()
    real = Path.glob

    def glob(folder: Path, pattern: str) -> Iterator[Path]:
        found = sorted(real(folder, pattern))
        files[-1].unlink()
        return iter(found)

    monkeypatch.setattr(Path, "glob", glob)
    _remove_old(tmp_path, "norm")
    monkeypatch.undo()
    assert sorted(tmp_path.iterdir()) == sorted([*files[:_KEPT], tmp_path / "other-1.so"])
