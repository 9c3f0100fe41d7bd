"""A program and another one beside it: signals, exit codes, restarts, and what is left when one of them is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from child_process import is_running
from prefixtune.utils.supervise import RestartPauses

# Notes its process id, then waits; SIGTERM ends it with 7.
WAITS = (
    "import os, signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"
    "open(sys.argv[1], 'a').write(f'{os.getpid()}\\n'); time.sleep(60)"
)


class Supervised:
    """A supervisor of two programs that note their process ids in files."""

    def __init__(self, folder: Path, program: str = WAITS) -> None:
        self.program, self.beside = folder / "program", folder / "beside"
        beside = [sys.executable, "-c", WAITS, str(self.beside)]
        self.socket = folder / "made" / "beside.sock"
        supervise = [sys.executable, "-m", "prefixtune.utils.supervise", str(self.socket)]
        command = [*supervise, *beside, "--", sys.executable, "-c", program]
        self.process = subprocess.Popen([*command, str(self.program)], stderr=subprocess.PIPE, text=True)

    def pids(self, path: Path, count: int = 1) -> list[int]:
        """The ids that were noted, once there are so many."""
        until(lambda: path.exists() and path.read_text().count("\n") >= count)
        return [int(line) for line in path.read_text().split()]

    def wait(self) -> int:
        """The exit code, when nothing runs any more."""
        code = self.process.wait(20)
        for path in (self.program, self.beside):
            for pid in self.pids(path) if path.exists() else ():
                until(lambda pid=pid: not is_running(pid))
        return code


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def supervised(tmp_path: Path) -> Iterator[Supervised]:
    """Two programs that wait."""
    supervised = Supervised(tmp_path)
    supervised.pids(supervised.program)
    supervised.pids(supervised.beside)
    yield supervised
    supervised.process.kill()
    with contextlib.suppress(ValueError):
        supervised.process.communicate()


@pytest.mark.parametrize(("code", "expected"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), 9)", 137)])
def test_the_programs_exit_code_is_passed_on(code: str, expected: int, tmp_path: Path):
    supervised = Supervised(tmp_path, f"import os, sys; {code}")
    assert supervised.wait() == expected
    supervised.process.communicate()


@pytest.mark.parametrize("is_killed", [False, True])
def test_a_signal_reaches_the_program_and_both_end_without_leaving_a_socket(is_killed: bool, supervised: Supervised):
    supervised.socket.parent.mkdir()
    if is_killed:
        # What one leaves that ends by itself is its folder alone.
        supervised.socket.touch()
    supervised.process.terminate()
    assert supervised.wait() == 7
    assert not supervised.socket.parent.exists()


def test_pauses_double_up_to_a_minute_and_begin_anew_after_a_steady_minute():
    pauses = RestartPauses()
    assert [pauses.next(1.0) for _ in range(9)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert [pauses.next(61.0), pauses.next()] == [1, 2]


def test_the_one_beside_is_started_again(supervised: Supervised):
    (first,) = supervised.pids(supervised.beside)
    os.kill(first, signal.SIGKILL)
    _, second = supervised.pids(supervised.beside, 2)
    assert is_running(second)
    supervised.process.terminate()
    assert supervised.wait() == 7
    assert "ended (code -9); it is started again in 1 s" in supervised.process.communicate()[1]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends the children of a killed process")
def test_both_end_when_the_supervisor_is_killed(supervised: Supervised):
    supervised.process.kill()
    assert supervised.wait() == -9


def test_nothing_large_stays_in_memory():
    code = "import prefixtune.utils.supervise, sys; print({'torch', 'pydantic', 'rich'} & sys.modules.keys())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
