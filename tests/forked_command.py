"""Commands of `prefixtune` and scripts in processes of their own, forked from one that has imported the libraries.

Importing torch and transformers takes most of the time of a server's start. One process does so for all tests of a
session, runs nothing else, and forks: each command begins as in a new process, with its own environment and streams.
What a forked process starts with `sys.executable` is forked as well.
"""

import atexit
import contextlib
import functools
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

LIBRARIES = ("prefixtune.cli.main", "prefixtune.server.app", "prefixtune.server.launch", "prefixtune.engine.engine")
LIBRARIES += (
    "prefixtune.backbone.load",
    "prefixtune.training.train",
    "prefixtune.jobs.worker",
    "transformers.models.llama.modeling_llama",
    "uvicorn",
)

PROGRAM = """\
#!{python} -S
import json, os, signal, socket, sys

if sys.argv[1] == "-P" and sys.argv[2:4] != ["-m", "prefixtune"]:
    # Such as the reader of uploads, which limits its memory.
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
connection = socket.socket(socket.AF_UNIX)
connection.connect({path!r})
asked = json.dumps({{"arguments": sys.argv[1:], "env": dict(os.environ), "cwd": os.getcwd()}}).encode()
socket.send_fds(connection, [len(asked).to_bytes(4, "big")], [0, 1, 2])
connection.sendall(asked)
answers = connection.makefile()
command = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: os.kill(command, number))
sys.exit(int(answers.readline()) % 256)
"""


class ForkedCommand:
    """`prefixtune` with some arguments, with the methods of `subprocess.Popen` that tests use."""

    def __init__(self, *arguments, env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE):
        theirs, self.stdin = _input(stdin)
        out, self.stdout = _output(stdout)
        err, self.stderr = (os.dup(out), None) if stderr == subprocess.STDOUT else _output(stderr)
        self._connection = socket.socket(socket.AF_UNIX)
        self._connection.connect(start_forking())
        words = ["-m", "prefixtune", *arguments]
        env = {"PYTHONWARNINGS": "error::FutureWarning", **env}
        asked = json.dumps({"arguments": words, "env": env, "cwd": str(Path.cwd())}).encode()
        socket.send_fds(self._connection, [len(asked).to_bytes(4, "big")], [theirs, out, err])
        self._connection.sendall(asked)
        for handed in (theirs, out, err):
            os.close(handed)
        self._answers = self._connection.makefile()
        self.pid = int(self._answers.readline())
        self.returncode = None
        self._waiter = threading.Thread(target=self._wait, daemon=True)
        self._waiter.start()

    def _wait(self):
        self.returncode = int(self._answers.readline())
        self._answers.close()
        self._connection.close()

    def poll(self):
        return self.returncode

    def wait(self, timeout=None):
        self._waiter.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("prefixtune", timeout or 0)
        return self.returncode

    def send_signal(self, number):
        if self.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout=None):
        """What it writes until it ends."""
        with ThreadPoolExecutor(2) as pool:
            reads = [pool.submit(_read, stream) for stream in (self.stdout, self.stderr)]
            self.wait(timeout)
            out, err = (read.result() for read in reads)
        return out, err


def _input(kind):
    """The end of a stream that the command gets, and the other one."""
    if kind == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_RDONLY), None
    read, write = os.pipe()
    return read, os.fdopen(write, "w", encoding="utf-8")


def _output(kind):
    if kind == subprocess.DEVNULL:
        return os.open(os.devnull, os.O_WRONLY), None
    read, write = os.pipe()
    return write, os.fdopen(read, encoding="utf-8", errors="replace")


def _read(stream):
    if stream is None:
        return ""
    with stream:
        return stream.read()


@functools.cache
def start_forking():
    """Start the process that forks; the path of its socket."""
    folder = tempfile.TemporaryDirectory()
    path = os.path.join(folder.name, "socket")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, __file__, path], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    program = Path(_program(path))
    program.write_text(PROGRAM.format(python=sys.executable, path=path), encoding="utf-8")
    program.chmod(0o755)
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == "ready\n"

    def end(stdin=process.stdin):
        process.terminate()
        process.wait()
        folder.cleanup()

    atexit.register(end)
    return path


def forking_python():
    """A program to use in place of Python, for a module (`-m`) or a script."""
    return _program(start_forking())


def _program(path):
    return f"{path}-python"


def _serve(path):
    """Fork for each connection; returns in the forked processes, with the exit code of the command."""
    import importlib

    for name in LIBRARIES:
        importlib.import_module(name)
    # A process that waits for a command, and that nobody waits for.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    print("ready", flush=True)
    while True:
        if sys.stdin in select.select([listener, sys.stdin], [], [])[0]:
            # The tests have ended, and with them the other end.
            return 0
        connection, _ = listener.accept()
        if not os.fork():
            break
        connection.close()
    listener.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    head, streams, _, _ = socket.recv_fds(connection, 4, 3)
    with connection.makefile("rb") as reader:
        asked = json.loads(reader.read(int.from_bytes(head, "big")))
    if pid := os.fork():
        for stream in streams:
            os.close(stream)
        # Nobody may be left to hear of it.
        with contextlib.suppress(OSError):
            connection.sendall(f"{pid}\n".encode())
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            connection.sendall(f"{code}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.closerange(3, 1024)
    os.environ.clear()
    os.environ.update(asked["env"])
    os.chdir(asked["cwd"])
    sys.executable = _program(path)
    return _run(asked["arguments"])


def _run(words):
    """Do what Python does with the words of its command line; returns the exit code."""
    if action := os.environ.get("PYTHONWARNINGS", "").partition(":")[0]:
        warnings.simplefilter(action, FutureWarning)
    sys.path[:0] = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    while words[0] in ("-P", "-u"):
        words = words[1:]
    if words[:2] == ["-m", "prefixtune"]:
        from prefixtune.cli.main import main

        return main(words[2:])
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, os.path.dirname(os.path.abspath(words[0])))
        runpy.run_path(words[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    # Modules of the tests must not stand before others of their name.
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    sys.exit(_serve(sys.argv[1]))
