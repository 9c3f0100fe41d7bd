"""What figures were measured on."""

from __future__ import annotations

import json
import os
import platform

import torch

from prefixtune import __version__
from prefixtune.utils.machine import describe_machine, versions


def test_the_machine_and_the_versions_are_plain_json():
    facts = describe_machine()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["processor"]
    assert 1 <= facts["cores"] <= (os.cpu_count() or 1)
    assert float(facts["memory_gib"]) > 0.5
    found = versions()
    assert (found["python"], found["prefixtune"]) == (platform.python_version(), __version__)
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
