"""Benchmarks that run for hours look for their data before they begin."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

from bench import joined, memories


@pytest.mark.parametrize(
    ("program", "arguments", "words"),
    [
        (memories, ["--methods", "words-mlp,lora-4", "--data", "e2e-100,webnlg", "--e2e", "."], "nowhere"),
        (memories, ["--methods", "words-mlp,lora-5"], "there is no lora-5"),
        (memories, ["--methods", "words-mlp", "--data", "e2e-100,e2e-101"], "there is no e2e-101"),
        (joined, ["--data", ".", "--names", "four-1,four-2"], "no folder four-1, four-2"),
    ],
)
def test_what_is_missing_is_said_at_the_start(
    program: ModuleType,
    arguments: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    more = ["--webnlg", "nowhere"] if program is memories else []
    monkeypatch.setattr(sys, "argv", ["bench", *arguments, *more])
    with pytest.raises(SystemExit) as stopped:
        program.main()
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
