"""Run a program to its end, and another one beside it that is started again whenever it ends.

    python -m prefixtune.utils.supervise SOCKET BESIDE ... -- PROGRAM ...

SOCKET is the file that the one beside listens on; at the end it and its lock are removed, and so is their folder if
that is empty.
Signals are passed on to the program, and its exit code becomes that of this process. Neither outlives this process,
however it ends. Imports nothing of the project, as it stays in memory as long as the program does.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

__all__ = ["RestartPauses", "main", "supervise"]


_SIGNALS = tuple(
    getattr(signal, name)
    for name in ("SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT", "SIGUSR1", "SIGUSR2")
    # Some systems have only the first two.
    if hasattr(signal, name)
)
_POLL_SECONDS = 0.2
_STOP_SECONDS = 45.0
"""Time for the program beside to end by itself."""
_PR_SET_PDEATHSIG = 1


class RestartPauses:
    """The pauses before what ended or failed is tried again: 1, 2, 4, ... seconds.

    Attributes:
        SHORTEST: Seconds of the first one.
        LONGEST: Seconds.
        STEADY: What went well for so many seconds before it ended is tried again after the shortest pause.
    """

    SHORTEST, LONGEST, STEADY = 1.0, 60.0, 60.0

    def __init__(self) -> None:
        self._pause = 0.0

    def next(self, lasted: float = 0.0) -> float:
        """The seconds to wait.

        Args:
            lasted: Seconds that it went well since it was last tried.
        """
        is_first = not self._pause or lasted > self.STEADY
        self._pause = self.SHORTEST if is_first else min(self.LONGEST, 2 * self._pause)
        return self._pause


def supervise(program: Sequence[str], beside: Sequence[str], socket: str) -> int:
    """Run a program, and another one beside it; returns the program's exit code, or 128 + the signal that ended it.

    Args:
        program: The command of the program.
        beside: That of the one beside.
        socket: A file of the one beside, which is removed with its folder when both have ended.

    Raises:
        OSError: The program cannot be started.
    """
    received: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in running:
            process.send_signal(number)

    for one in _SIGNALS:
        signal.signal(one, pass_on)
    process = _start(program)
    running.append(process)
    for early in received:
        # There was nobody yet to pass them on to.
        process.send_signal(early)
    helper: subprocess.Popen[bytes] | None = None
    pauses, began, not_before = RestartPauses(), 0.0, 0.0
    try:
        while (code := process.poll()) is None:
            now = time.monotonic()
            if helper is not None and (ended := helper.poll()) is not None:
                helper, pause = None, pauses.next(now - began)
                not_before = now + pause
                print(
                    f"warning: the server for training ended (code {ended}); it is started again in {pause:g} s.",
                    file=sys.stderr,
                )
            elif helper is None and now >= not_before:
                not_before = now + pauses.SHORTEST
                # The system may start no process now.
                with contextlib.suppress(OSError):
                    helper, began = _start(beside), now
            time.sleep(_POLL_SECONDS)
    finally:
        if helper is not None:
            _stop(helper)
        _remove_with_folder(socket)
    return code if code >= 0 else 128 - code


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _remove_with_folder(path: str) -> None:
    """Remove a socket's file, and its folder if nothing else is in it."""
    for remove, what in ((os.unlink, path), (os.rmdir, os.path.dirname(path))):
        with contextlib.suppress(OSError):
            remove(what)


def _start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    # In a group of its own: Ctrl-C reaches this process alone, which passes it on once.
    return subprocess.Popen(command, process_group=0, preexec_fn=_end_with(os.getpid()))


def _end_with(parent: int) -> Callable[[], None] | None:
    """What a child does before it runs its program: have the system end it when its parent is gone."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None).prctl

    def ask() -> None:
        prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask


def main(arguments: Sequence[str]) -> int:
    """Run the two commands of the command line."""
    split = list(arguments).index("--")
    return supervise(arguments[split + 1 :], arguments[1:split], arguments[0])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
