"""The command line, for the tests, within this process. For one of its own: `forked_command`."""

import contextlib
import io
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
