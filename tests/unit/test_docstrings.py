"""Examples in docstrings say what happens."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import prefixtune

SOURCE = Path(prefixtune.__file__).parent
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_examples_in_docstrings(path):
    name = ".".join(["prefixtune", *path.relative_to(SOURCE).with_suffix("").parts]).removesuffix(".__init__")
    found = doctest.testmod(importlib.import_module(name))
    assert found.failed == 0
    # Every one that is written is run.
    assert found.attempted == len(re.findall(r"^\s*>>> ", path.read_text(encoding="utf-8"), re.M))
