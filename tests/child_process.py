"""A process that holds a file or a lock of this project until it is killed, and whether a process runs."""

import os
import subprocess
import sys

import psutil

_IMPORTS = """
import sys, time
from pathlib import Path
from prefixtune.utils.files import *
from prefixtune.utils.locks import *
"""


def start_child(code, *arguments):
    """Run `code` in a new process; returns when it has printed `ready`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen(
        [sys.executable, "-c", _IMPORTS + code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process):
    process.kill()
    process.communicate()


def is_running(pid):
    """Whether there is such a process; one that has ended, and that nobody has waited for, does not run."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
