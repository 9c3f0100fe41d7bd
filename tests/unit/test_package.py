"""The front door: exports, and the generated pages."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import prefixtune as pt

ROOT = Path(__file__).resolve().parents[2]


def test_exports_are_a_dozen_names_that_exist() -> None:
    assert len(pt.__all__) <= 12
    for name in pt.__all__:
        assert getattr(pt, name) is not None
    # Functions, not the modules of a like name.
    assert all(callable(getattr(pt, name)) for name in ("train", "generate", "evaluate", "load_backbone"))


def test_an_unknown_name_is_an_attribute_error() -> None:
    assert not hasattr(pt, "no_such_name")


def test_the_command_line_page_is_current() -> None:
    done = subprocess.run([sys.executable, ROOT / "docs" / "build.py", "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
