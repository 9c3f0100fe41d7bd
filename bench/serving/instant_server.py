"""`prefixtune serve` with an engine that computes nothing: every token of a request is there at once, one by one.

`bench.serving.overhead` starts it with the sources to measure first on the path, so it uses only what versions have in
common.

    python -m bench.serving.instant_server SOURCES OPTIONS...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import prefixtune
from prefixtune.engine import worker
from prefixtune.engine.request import FinishReason, Request, SequenceOutput, Token

TOKEN = Token(5)
TEXT = "word "


class InstantWorker(worker.EngineWorker):
    """Answers a request while it is submitted."""

    def submit(self, request: Request, on_output: Any, deadline: float | None = None) -> None:
        """Call back with all outputs of a request."""
        for index in range(request.n):
            for remaining in reversed(range(request.sampling.max_new_tokens)):
                reason: FinishReason | None = None if remaining else "length"
                on_output(SequenceOutput(request.id, index, (TOKEN,), TEXT, reason))


def main() -> None:
    """Serve until a signal stops it."""
    sources = Path(sys.argv[1]).resolve()
    if not Path(prefixtune.__file__).resolve().is_relative_to(sources):
        raise SystemExit(f"prefixtune is imported from {prefixtune.__file__}, not from {sources}.")
    worker.EngineWorker = InstantWorker  # type: ignore[misc]
    sys.argv = ["prefixtune", "serve", *sys.argv[2:]]
    runpy.run_module("prefixtune", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
