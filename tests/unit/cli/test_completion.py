"""`prefixtune --install-completion`: what bash completes with its script, and where it is written."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from command_line import run

COMPLETE = (
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _prefixtune; printf "%s\\n" "${COMPREPLY[@]}"'
)


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("completion") / "prefixtune.bash"
    run("--install-completion", "--shell", "bash", "--output", str(file))
    return file


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
@pytest.mark.parametrize(
    ("words", "completions"),
    [
        (["exp"], {"explain", "export"}),
        (["c"], {"chat", "compose", "convert"}),
        (["train", "--learning"], {"--learning-rate"}),
        (["export", "--kv-type", ""], {"f16", "f32", "bf16"}),
        (["doctor", "--quantize", "int"], {"int4", "int8"}),
        (["report", "runs", "--output", "my-p"], {"my-page.html"}),
        (["generate", "--prefix", "my-p"], {"my-page.html"}),
        (["demo", "--steps", ""], set()),
    ],
)
def test_bash_completes_commands_options_choices_and_files(
    script: Path, tmp_path: Path, words: list[str], completions: set[str]
) -> None:
    (tmp_path / "my-page.html").touch()
    command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "prefixtune", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert (set(done.stdout.split()), done.stderr) == (completions, "")
