"""What figures were measured on, and the peak of memory."""

from __future__ import annotations

import builtins
import json
import os
import platform
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixtune import __version__
from prefixtune.utils.machine import command_line, describe_machine, peak_memory_mib, reset_peak_memory, versions

MIB = 2**20


def test_the_machine_is_described_in_plain_json():
    facts = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["processor"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert platform.system() in str(facts["system"])
    assert float(facts["memory_gib"]) > 0.5


def test_a_command_is_as_a_shell_takes_it(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "argv", ["/bin/prefixtune", "study", "--task-words", "Say it:", "--data", "e2e/"])
    assert command_line() == "prefixtune study --task-words 'Say it:' --data e2e/"


def test_versions_are_those_in_use():
    facts = versions()
    assert facts["python"] == platform.python_version()
    assert facts["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["prefixtune"] == __version__
    assert "sacrebleu" in facts


def test_what_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("prefixtune.utils.machine._PACKAGES", ("torch", "no-such-package-here"))
    assert set(versions()) == {"python", "torch"}


def test_the_peak_is_that_since_it_was_forgotten():
    if not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("this system does not count the peak anew")
    reset_peak_memory()
    before = peak_memory_mib()
    assert before is not None
    # Filled, as memory is taken when it is written to.
    held = bytearray(os.urandom(1) * (96 * MIB))
    grown = peak_memory_mib()
    del held
    assert grown is not None
    assert 90 < grown - before < 250
    assert peak_memory_mib() == pytest.approx(grown, abs=1), "a peak stays when the memory is free again"
    reset_peak_memory()
    after = peak_memory_mib()
    assert after is not None
    assert after < grown - 60


def test_without_proc_the_peak_is_the_processs(monkeypatch: pytest.MonkeyPatch):
    usage = pytest.importorskip("resource")

    def nothing(*arguments: Any, **options: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", nothing)
    monkeypatch.setattr(Path, "write_text", nothing)
    reset_peak_memory()
    found = peak_memory_mib()
    scale = MIB if platform.system() == "Darwin" else 2**10
    assert found == pytest.approx(usage.getrusage(usage.RUSAGE_SELF).ru_maxrss / scale, rel=0.01)
    assert describe_machine()["processor"]
    load = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name == "resource":
            raise ImportError(name)
        return load(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    assert peak_memory_mib() is None
