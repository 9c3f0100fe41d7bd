"""What figures were measured on, and the peak of memory."""

from __future__ import annotations

import json
import os
import platform

import pytest
import torch

from bench.machine import peak_memory_mib, reset_peak_memory
from prefixtune import __version__
from prefixtune.utils.machine import describe_machine, versions

MIB = 2**20


def test_the_machine_and_the_versions_are_plain_json():
    facts = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["processor"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert float(facts["memory_gib"]) > 0.5
    found = versions()
    assert (found["python"], found["prefixtune"]) == (platform.python_version(), __version__)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]


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
    reset_peak_memory()
    after = peak_memory_mib()
    assert after is not None
    assert after < grown - 60
