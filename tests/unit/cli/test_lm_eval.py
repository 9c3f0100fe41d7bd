"""`prefixtune lm-eval` where lm-eval is not installed, and its options."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from command_line import call
from prefixtune.cli.commands.lm_eval import split_by_task
from prefixtune.errors import ConfigError


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "lm_eval" or ".lm_eval." in name]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ConfigError) as caught:
        call("lm-eval", "--tasks", "hellaswag", "--prefix", tmp_path / "none.safetensors")
    assert "`prefixtune lm-eval` needs lm_eval, which is not installed." in caught.value.message
    assert "none.safetensors" in caught.value.message, "all faults at once"
    assert "pip install 'prefixtune[lm-eval]'" in caught.value.hint


def test_a_file_with_an_equals_sign_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=3.safetensors").touch()
    assert split_by_task(["lr=3.safetensors", "piqa=lr=3.safetensors"]) == {
        "": "lr=3.safetensors",
        "piqa": "lr=3.safetensors",
    }


@pytest.mark.parametrize("text", ["", "piqa=", "=runs/piqa"])
def test_an_empty_name_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="FILE or TASK=FILE is needed"):
        split_by_task([text])
