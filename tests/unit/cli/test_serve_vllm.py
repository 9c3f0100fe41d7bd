"""`prefixtune serve --engine vllm`: what is checked before vLLM starts."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from command_line import run
from prefixtune.cli.commands.serve_vllm import PLUGIN_PROBE


def test_the_probe_of_vllms_python_loads_every_library_that_the_plugin_needs() -> None:
    code = f"{PLUGIN_PROBE}; import sys; print({{'jaxtyping', 'safetensors', 'torch'}} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


def test_a_python_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("prefixtune.cli.commands.serve_vllm._PROBE_SECONDS", 0.2)
    files = ("--backbone", str(tmp_path), "--prefixes", str(tmp_path), "--train-workers", "0")
    _, printed = run("serve", "--engine", "vllm", "--vllm-python", str(python), *files, code=2)
    assert str(python) in printed


def test_the_training_server_has_the_cache_of_vllm(tmp_path: Path) -> None:
    """Otherwise results of another size would be refused there."""
    files = ("--backbone", str(tmp_path), "--prefixes", str(tmp_path))
    printed, _ = run("serve", "--engine", "vllm", *files, "--cache-mib", "4096", "--show-command")
    _, training = printed.splitlines()
    assert "--cache-mib 4096" in training
