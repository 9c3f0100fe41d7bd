"""docs/models.md says of every model type what `prefixtune doctor` finds, on a tiny random model of it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers

from zoo import ZOO, make_tokenizer

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
sys.path.insert(0, str(ROOT / "docs"))

import support  # noqa: E402

MADE_WITH = re.search(r"with transformers (\S+) and torch ", PAGE)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@pytest.mark.parametrize("name", ZOO)
def test_the_verdict_on_a_model_is_current(name: str, tokenizer: Any) -> None:
    assert MADE_WITH is not None
    if MADE_WITH[1] != transformers.__version__:
        pytest.skip(f"the page was made with transformers {MADE_WITH[1]}, but {transformers.__version__} is here")
    row = support.table([support.examine_one(name, tokenizer)])[-1]
    assert row in PAGE.splitlines(), f"run `python docs/support.py`: {row}"
