"""The command line, for the tests: within this process, or as a program of its own.

A program of its own imports torch and transformers anew, which takes seconds: it is started where that is the point,
to be killed, piped to, or to share its work.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.cli.main import main
from prefixtune.cli.main import run as run_command


def run(*arguments: str, code: int = 0, stdin: str = "", cwd: Path | None = None) -> tuple[str, str]:
    """A command within this process; its stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patch,
        contextlib.chdir(cwd or Path.cwd()),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        patch.setattr(sys, "stdin", io.StringIO(stdin))
        returned = main(arguments)
    assert returned == code, f"exit code {returned}\n{out.getvalue()}\n{err.getvalue()}"
    return out.getvalue(), err.getvalue()


def call(*arguments: object) -> int:
    """A command within this process, whose errors are raised and not printed; its exit code."""
    return run_command([str(argument) for argument in arguments])


def run_apart(*arguments: str, code: int = 0, stdin: str = "", **options: Any) -> tuple[str, str]:
    """A command as a program of its own; its stdout and stderr."""
    process = start(*arguments, **options)
    out, err = process.communicate(stdin, timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
    """A program that has just been started; `environment` is added to this process's own."""
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "error::FutureWarning",
    }
    environment.update(options.pop("environment", {}))
    return subprocess.Popen(
        [sys.executable, "-m", "prefixtune", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def until(process: Any, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Read a process's events up to the first one that is wanted."""
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if wanted(events[-1]):
            return events
    raise AssertionError(f"it ended before: {process.stderr.read()}")
