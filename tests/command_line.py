"""The command line, for the tests: within this process, or as a program of its own.

A program of its own imports torch and transformers anew, which takes seconds: it is started where that is the point,
to be killed, piped to, or to share its work.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prefixtune.cli.main import main
from prefixtune.cli.main import run as run_command


def run(*arguments, code=0, stdin="", cwd=None):
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


def call(*arguments):
    """A command within this process, whose errors are raised and not printed; its exit code."""
    return run_command([str(argument) for argument in arguments])


def run_apart(*arguments, code=0, stdin="", **options):
    """A command as a program of its own; its stdout and stderr."""
    process = start(*arguments, **options)
    out, err = process.communicate(stdin, timeout=120)
    assert process.returncode == code, f"exit code {process.returncode}\n{out}\n{err}"
    assert "Traceback" not in err
    return out, err


def start(*arguments, **options):
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


def until(process, wanted):
    """Read a process's events up to the first one that is wanted."""
    events = []
    for line in process.stdout:
        events.append(json.loads(line))
        if wanted(events[-1]):
            return events
    raise AssertionError(f"it ended before: {process.stderr.read()}")
