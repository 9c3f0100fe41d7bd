"""A server for training with its workers, all of them processes that may be killed, and what may befall them."""

import contextlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx2
import psutil

_RETRY_SECONDS = 0.2


def free_port():
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _postgres_folder():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin")) or [Path(shutil.which("pg_ctl") or "").parent]
    return found[-1]


def has_postgres():
    """Whether this machine has Debian's Postgres, or another one in the path."""
    return (_postgres_folder() / "initdb").exists()


class Postgres:
    """A Postgres of its own, run by a user other than root, in a folder that this user may enter."""

    def __init__(self):
        self.port, self._user, self._bin = free_port(), "", _postgres_folder()
        self._data = Path(tempfile.mkdtemp(prefix="prefixtune-postgres-"))
        if os.geteuid() == 0:
            self._user = "postgres"
            shutil.chown(self._data, self._user)
        self._run("initdb", "-D", str(self._data), "-A", "trust", "-U", "prefixtune", "--no-sync")
        self.start()
        self._run("createdb", "-h", "127.0.0.1", "-p", str(self.port), "-U", "prefixtune", "jobs")
        self.url = f"postgresql://prefixtune:secret@127.0.0.1:{self.port}/jobs"

    def _run(self, program, *arguments):
        subprocess.run(
            [str(self._bin / program), *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
            cwd="/",
            user=self._user or None,
            group=self._user or None,
            extra_groups=[] if self._user else None,
        )

    def start(self):
        """Start it; returns when it answers."""
        options = f"-p {self.port} -k {self._data} -c listen_addresses=127.0.0.1"
        self._run("pg_ctl", "-D", str(self._data), "-o", options, "-l", str(self._data / "log"), "-w", "start")

    def stop(self):
        """Stop it at once, as a power cut would."""
        self._run("pg_ctl", "-D", str(self._data), "-m", "immediate", "-w", "stop")

    def close(self):
        """Stop it, and remove its data."""
        self.stop()
        shutil.rmtree(self._data, ignore_errors=True)


class Http:
    """Requests that are sent again until they are answered: the server may be killed at any moment.

    Args:
        url: Of the server.
        give_up: Seconds after which a request fails.
    """

    def __init__(self, url, give_up=180.0):
        self._client, self._give_up = httpx2.Client(base_url=url, timeout=30.0), give_up
        self.faults = []
        """Answers that no request should get."""

    def close(self):
        """Close the connections."""
        self._client.close()

    def once(self, method, path, **options):
        """Status and body of the answer; None: nobody answered."""
        try:
            answer = self._client.request(method, path, **options)
        except (httpx2.HTTPError, OSError):
            return None
        is_json = answer.headers.get("content-type", "").startswith("application/json")
        body = answer.json() if is_json else answer.content
        if answer.status_code >= 500 and answer.status_code not in (503, 507):
            self.faults.append(f"{method} {path}: {answer.status_code} {body}")
        return answer.status_code, body

    def __call__(self, method, path, **options):
        """Status and body of the first answer other than 429 and 5xx."""
        end, answer = time.monotonic() + self._give_up, None
        while time.monotonic() < end:
            answer = self.once(method, path, **options)
            if answer is not None and answer[0] < 500 and answer[0] != 429:
                return answer
            time.sleep(_RETRY_SECONDS)
        raise SystemExit(f"error: {method} {path} was not answered: {answer}")


class Service:
    """`prefixtune serve`, and workers beside its own.

    Args:
        model: The backbone.
        folder: For data, prefixes and logs.
        database_url: Of the queue; empty: SQLite in the data folder.
        workers: How many, with the server's own one.
    """

    def __init__(self, model, folder, database_url, workers):
        self.folder, self.data, self.prefixes = folder, folder / "data", folder / "prefixes"
        for made in (self.data, self.prefixes):
            made.mkdir(parents=True, exist_ok=True)
        self.database_url, self.port = database_url, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        shared = ["--backbone", str(model), "--dtype", "float32", "--device", "cpu"]
        shared += ["--prefixes", str(self.prefixes), "--data-folder", str(self.data)]
        server = ["serve", *shared, "--port", str(self.port), "--drain-seconds", "5"]
        # As important as anything else here, or other work on the machine would make it wait.
        server += ["--train-threads", "1", "--train-nice", "0"]
        self._commands = [server, *[["worker", *shared, "--threads", "1"]] * (workers - 1)]
        self._environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            **({"PREFIXTUNE_SERVE_DATABASE_URL": database_url} if database_url else {}),
            **({"PREFIXTUNE_WORKER_DATABASE_URL": database_url} if database_url else {}),
        }
        self.processes = [self._start(index) for index in range(len(self._commands))]
        self._changing, self._ends = threading.Lock(), threading.Event()
        self._manager = _in_thread(self._restart_ended)

    def _start(self, index):
        with open(self.folder / f"{'server' if index == 0 else f'worker-{index}'}.log", "ab") as log:
            command = [sys.executable, "-m", "prefixtune", *self._commands[index]]
            return subprocess.Popen(
                command, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )

    def _restart_ended(self):
        """Start what has ended by itself again, as a service manager does: nothing starts while the disk is full."""
        while not self._ends.wait(1.0):
            with self._changing:
                for index, process in enumerate(self.processes):
                    if process.poll() is not None:
                        self.processes[index] = self._start(index)

    def _end_restarts(self):
        self._ends.set()
        self._manager.join()

    @property
    def server(self):
        """The server's process."""
        return self.processes[0]

    def children(self):
        """The server's own worker, if it runs."""
        try:
            return [one for one in psutil.Process(self.server.pid).children() if "worker" in one.cmdline()]
        except psutil.Error:
            return []

    def kill_server(self):
        """`kill -9`, and start it again."""
        self.kill_worker(0)

    def kill_child(self):
        """`kill -9` for the server's own worker; returns how many ran."""
        children = self.children()
        for child in children:
            with contextlib.suppress(psutil.Error):
                child.kill()
        return len(children)

    def kill_worker(self, index):
        """`kill -9` for a worker, or with 0 for the server, and start it again."""
        with self._changing:
            self.processes[index].kill()
            self.processes[index].wait()
            self.processes[index] = self._start(index)

    def stop(self):
        """Stop all in good order; returns their exit codes."""
        self._end_restarts()
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        return [process.wait(60) for process in self.processes]

    def close(self):
        """End what still runs."""
        self._end_restarts()
        self.kill_child()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()

    def lock_database(self, seconds):
        """Lock the SQLite database for others, in a thread that ends with the lock."""

        def hold():
            connection = sqlite3.connect(self.data / "jobs.sqlite", timeout=30.0, isolation_level=None)
            connection.execute("BEGIN EXCLUSIVE")
            time.sleep(seconds)
            connection.execute("ROLLBACK")
            connection.close()

        return _in_thread(hold)


def _in_thread(work):
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
