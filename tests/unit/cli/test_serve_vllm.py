"""`prefixtune serve --engine vllm`: what is checked before vLLM starts."""

from __future__ import annotations

import subprocess
import sys

from prefixtune.cli.commands.serve_vllm import PLUGIN_PROBE


def test_the_probe_of_vllms_python_loads_every_library_that_the_plugin_needs() -> None:
    code = f"{PLUGIN_PROBE}; import sys; print({{'jaxtyping', 'safetensors', 'torch'}} <= sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"
