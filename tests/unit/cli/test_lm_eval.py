"""`prefixtune lm-eval` where lm-eval is not installed."""

from __future__ import annotations

import sys

import pytest

from command_line import call
from prefixtune.errors import ConfigError


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or ".lm_eval." in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError) as caught:
        call("lm-eval", "--tasks", "hellaswag")
    assert "lm_eval" in caught.value.message
    assert "pip install 'prefixtune[lm-eval]'" in caught.value.hint
