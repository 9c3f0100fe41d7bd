"""`prefixtune --install-completion`: what bash completes with its script, and where it is written."""

import shutil
import subprocess

import pytest

from command_line import run

COMPLETE = (
    'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _prefixtune; printf "%s\\n" "${COMPREPLY[@]}"'
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash on this machine")
def test_bash_completes_commands_options_choices_and_files(tmp_path):
    script = tmp_path / "prefixtune.bash"
    run("--install-completion", "--shell", "bash", "--output", str(script))
    (tmp_path / "my-page.html").touch()
    for words, completions in (
        (["c"], {"chat", "compose", "convert"}),
        (["train", "--learning"], {"--learning-rate"}),
        (["export", "--kv-type", ""], {"f16", "f32", "bf16"}),
        (["generate", "--prefix", "my-p"], {"my-page.html"}),
    ):
        command = ["bash", "--norc", "-c", COMPLETE, "bash", str(script), "prefixtune", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert set(done.stdout.split()) == completions
