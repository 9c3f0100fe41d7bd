"""What commands write to: checked before anything loads, and left as it was by a refused command."""

from __future__ import annotations

from pathlib import Path

import pytest

from prefixtune.cli.main import main


def test_a_run_that_no_demo_made_is_kept(tmp_path: Path) -> None:
    (tmp_path / "prefix.safetensors").write_bytes(b"precious")
    assert main(["demo", "--output", str(tmp_path), "--quiet"]) == 2
    assert (tmp_path / "prefix.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--task", "e2e", "--train", "nowhere.csv", "--output", "{}/r1/r2/r3"],
        ["report", "nowhere", "--output", "{}/new/deep/a.html"],
        ["evaluate", "--task", "e2e", "--data", "nowhere.csv", "--output", "{}/new/scores"],
    ],
    ids=lambda words: words[0],
)
def test_a_refused_command_leaves_no_folder(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([word.format(tmp_path) for word in words]) == 2
    assert "nowhere" in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []
