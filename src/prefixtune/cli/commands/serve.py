"""`prefixtune serve` and `worker`: one model and many prefixes over HTTP; training what servers are asked for."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn

from prefixtune.cli.options import ConfigOptions, PathText, command, option
from prefixtune.errors import ConfigError, PrefixError
from prefixtune.jobs.config import WORKER_ENVIRONMENT, WorkerConfig
from prefixtune.server.logs import configure_logging
from prefixtune.server.settings import SERVER_LIBRARIES, ServeConfig
from prefixtune.utils.config import Layer
from prefixtune.utils.console import Console
from prefixtune.utils.extras import needs_extra

_STOP_SECONDS = 10.0
"""After a request to end, the longest time for the running step and for saving."""
_KEY = """\
key for its user; it is not stored anywhere:

    {key}

table for the file of --config:

    [keys.{name}]
    hash = "{hash}"
    prefixes = ["*"]              # patterns of model names
    requests_per_minute = 0       # 0: any number
    concurrent = 0                # requests at once; 0: any number
    admin = false                 # true: sees, changes and deletes what all keys have
    train = true                  # may upload files and train
    max_jobs = 10                 # unfinished"""


class ServeOptions(ConfigOptions, ServeConfig):
    """The options of `prefixtune serve`."""

    new_key: PathText = option("", "make an API key, print it and its table for NAME, and exit", metavar="NAME")
    quiet: bool = option(False, "only errors on stderr; the log on stdout has its level")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file that is named by `--config`, and the environment."""
        return [] if "new_key" in given else [*super().layers(given), *ServeConfig.sources(None, os.environ)]


@command
def serve(options: ServeOptions) -> int:
    """Serve one model and many prefixes over HTTP, with OpenAI's interface.

    The file of --config may also have tables [keys.NAME]. Variables such as PREFIXTUNE_SERVE_PORT win over the file,
    and options over both.

    For example:
        prefixtune serve --prefixes prefixes
        prefixtune serve --config serve.toml --host 0.0.0.0
        prefixtune serve --new-key alice
    """
    if options.new_key:
        from prefixtune.server.auth import hash_key, new_key

        # As TOML writes it: with no halves of a character, and without the character DEL.
        key, name = new_key(), json.dumps(options.new_key, ensure_ascii=False).replace("\x7f", "\\u007f")
        print(_KEY.format(key=key, name=name, hash=hash_key(key)))
        return 0
    config = options.part(ServeConfig)
    if config.engine == "llama.cpp":
        with needs_extra("llama", "--engine llama.cpp"):
            importlib.import_module("xllamacpp")
    with needs_extra("serve", "the server"):
        for library in SERVER_LIBRARIES:
            importlib.import_module(library)
        from prefixtune.server.launch import run as launch
    # Threads that still check an uploaded file have nobody to answer: nobody waits for these threads.
    return _exit_now(launch(config, Console(quiet=options.quiet)))


class WorkerOptions(ConfigOptions, WorkerConfig):
    """The options of `prefixtune worker`."""

    with_parent: bool = option(False, "end when stdin ends, as with the process that started this one")

    @classmethod
    def layers(cls, given: Mapping[str, Any]) -> Iterable[Layer]:
        """The file that is named by `--config`, and the environment."""
        return [*super().layers(given), Layer.from_environment(WORKER_ENVIRONMENT, os.environ)]


@command
def worker(options: WorkerOptions) -> int:
    """Train the jobs that servers take by OpenAI's interface (/v1/fine_tuning/jobs); one worker per device.

    `prefixtune serve` starts one by itself. Further ones share its data folder and its folder of prefixes, on this
    machine or, with --database-url, on others. It ends soon after SIGTERM, and may be killed: its jobs go on from
    their last saved state with the next worker.

    Variables such as PREFIXTUNE_WORKER_DATABASE_URL win over the file of --config, and options over both.

    For example:
        prefixtune worker --prefixes prefixes
        prefixtune worker --database-url postgresql://db/jobs --data-folder /mnt/jobs --prefixes /mnt/prefixes
    """
    config = options.part(WorkerConfig)
    if not Path(config.prefixes).is_dir():
        raise ConfigError(
            f"there is no folder of prefixes {config.prefixes!r}.",
            hint="name the one that the server serves: results are put there.",
        )
    with needs_extra("serve", "a worker"):
        import dbos  # noqa: F401
    configure_logging(config.log_level)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _request_stop(stop))
    if options.with_parent:
        threading.Thread(target=_follow_parent, args=(stop,), name="prefixtune-parent", daemon=True).start()
    # Threads of the library of jobs wait for jobs that are left to the next worker: nobody waits for these threads.
    return _exit_now(_run(config, stop))


def _run(config: WorkerConfig, stop: threading.Event) -> int:
    from prefixtune.jobs.worker import run_worker

    try:
        run_worker(config, stop)
    except PrefixError as error:
        Console().error(error.message, error.hint)
        return 2
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _request_stop(stop: threading.Event) -> None:
    """End soon, even if the running step takes longer than that; asked again, at once."""
    if stop.is_set():
        _exit_now(0)
    stop.set()
    timer = threading.Timer(_STOP_SECONDS, _exit_now, [0])
    timer.daemon = True
    timer.start()


def _follow_parent(stop: threading.Event) -> None:
    """End when the other end of stdin is closed, however its process ended."""
    with contextlib.suppress(OSError):
        while os.read(sys.stdin.fileno(), 4096):
            pass
    if not stop.is_set():
        _request_stop(stop)


def _exit_now(code: int) -> NoReturn:
    # Whoever reads them may be gone, and a signal may come in the middle of a line.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)
