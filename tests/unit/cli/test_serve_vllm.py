"""`prefixtune serve --engine vllm`: what is checked before vLLM starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import run
from fake_vllm_server import write_vllm
from prefixtune.cli.commands.serve_vllm import PLUGIN_PROBE
from prefixtune.errors import ConfigError
from prefixtune.interop.vllm.version import check_version


def test_the_probe_of_vllms_python_loads_every_library_that_the_plugin_needs() -> None:
    code = f"{PLUGIN_PROBE}; import sys; print({{'jaxtyping', 'safetensors', 'torch'}} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("version", ["0.30.0", "0.32.0+cpu", "0.33.1rc1", "1.0.0", "0.1.dev7+g012", "", "main"])
def test_versions_that_may_work(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize("version", ["0.29.0", "0.9.2", "0.11.1.post2"])
def test_versions_that_are_too_old(version: str) -> None:
    with pytest.raises(
        ConfigError, match=f"vLLM {version} is too old for prefixes, which need 0.30 or newer"
    ) as caught:
        check_version(version)
    assert "vllm>=0.30" in caught.value.hint


@pytest.mark.parametrize(
    ("version", "code", "says"),
    [
        ("0.28.0", 2, "vLLM 0.28.0 is too old"),
        ("0.32.1", 0, ""),
        ("0.33.0", 0, "vLLM 0.33.0 was not tested with prefixes, but 0.32 was."),
        ("", 0, "vLLM of an unknown version was not tested"),
    ],
)
def test_the_version_is_looked_at_before_vllm_starts(
    version: str, code: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = write_vllm(tmp_path / "fake")
    if version:
        (fake / f"vllm-{version}.dist-info").mkdir()
        (fake / f"vllm-{version}.dist-info" / "METADATA").write_text(f"Name: vllm\nVersion: {version}\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(fake), *sys.path]))
    started: list[str] = []
    monkeypatch.setattr(os, "execvpe", lambda program, *_: started.append(program) or 0)
    files = ("--backbone", str(tmp_path), "--prefixes", str(tmp_path), "--train-workers", "0")
    _, printed = run("serve", "--engine", "vllm", *files, code=code)
    assert says in " ".join(printed.split())
    assert ("not tested" in printed) == ("not tested" in says)
    assert started == ([] if code else [sys.executable])


def test_a_python_that_does_not_answer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexec sleep 60\n")
    python.chmod(0o755)
    monkeypatch.setattr("prefixtune.cli.commands.serve_vllm._PROBE_SECONDS", 0.2)
    files = ("--backbone", str(tmp_path), "--prefixes", str(tmp_path), "--train-workers", "0")
    _, printed = run("serve", "--engine", "vllm", "--vllm-python", str(python), *files, code=2)
    assert "has not answered within 0 seconds" in " ".join(printed.split())


def test_the_training_server_has_the_cache_of_vllm(tmp_path: Path) -> None:
    """Otherwise results of another size would be refused there."""
    files = ("--backbone", str(tmp_path), "--prefixes", str(tmp_path))
    printed, _ = run("serve", "--engine", "vllm", *files, "--cache-mib", "4096", "--show-command")
    _, training = printed.splitlines()
    assert "--cache-mib 4096" in training
