"""Start and stop a server: load the model, listen, serve, and shut down in good order.

After the first SIGTERM or SIGINT new requests get 503 and `/readyz` says so; running ones may finish within a limit;
then the process exits with 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import socket
import time
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.jobs.database import check_database
from prefixtune.jobs.folder import DataFolder
from prefixtune.server.connections import Connections, fit_open_files
from prefixtune.server.listener import bind
from prefixtune.server.logs import configure_logging, log
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training_worker import STOP_SECONDS, TrainingWorker, start_worker
from prefixtune.utils.console import Console
from prefixtune.utils.files import check_writable

if TYPE_CHECKING:
    from prefixtune.server.state import ServerState

__all__ = ["FolderWatch", "GracefulServer", "run", "watch_folder"]


_FLUSH_SECONDS = 5.0
"""Time to send the last responses, once all texts have ended or were cancelled."""
_MAX_WARNINGS = 10
"""Refused files that are named at the start."""
_WATCH_SECONDS = 0.25
"""Between looks at the time of the folder, where jobs publish their results."""
_SECOND_LOOK_SECONDS = 1.0
"""From a look at a folder that has changed to another one."""
_MAX_RETRY_SECONDS = 60.0
"""Longest pause before a folder that could not be read is read again, unless `reload_seconds` is longer."""


def run(config: ServeConfig, console: Console) -> int:
    """Serve until a signal stops it; returns the exit code.

    Raises:
        ConfigError: The folder of prefixes is missing or cannot be read, the data folder belongs to another database,
            or the address is in use.
        BackboneError: The model cannot be loaded or served.
    """
    folder = Path(config.prefixes)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder of prefixes {config.prefixes!r}.",
            hint="create it, and put the prefix files of `prefixtune train` there, as NAME.safetensors.",
        )
    try:
        os.scandir(folder).close()
    except OSError as error:
        raise ConfigError(
            f"the folder of prefixes {config.prefixes!r} cannot be read: {error.strerror}.",
            hint="let the server's user read and enter it.",
        ) from error
    if config.takes_jobs:
        data = DataFolder(Path(config.data_folder).absolute())
        check_database(data, config.database_url or data.database_url)
        try:
            check_writable(data.root / "any")
        except PrefixError as error:
            # Texts are generated all the same.
            console.warn(f"requests to train will be refused: {error.message}")
    max_connections, open_files = fit_open_files(config.max_connections)
    if max_connections < config.max_connections:
        console.warn(
            f"{max_connections} connections at once instead of {config.max_connections}: this process may open "
            f"{open_files} files; raise that limit (ulimit -n, or LimitNOFILE of systemd), or lower max_connections"
        )
    with bind(config) as listener:
        state = _load(config, console)
        configure_logging(config.log_level)
        _report_start(state, console, listener)
        training_worker = start_worker(config, state.training)
        server = GracefulServer(state, max_connections, training_worker)
        try:
            # Else each full collection looks at a million objects of torch, and stops all threads meanwhile.
            gc.collect()
            gc.freeze()
            server.run(sockets=[listener])
        finally:
            if training_worker is not None:
                training_worker.stop(0.0 if server.force_exit else STOP_SECONDS)
            state.close()
    log("stopped")
    return 0


def _load(config: ServeConfig, console: Console) -> ServerState:
    if config.engine == "none":
        return _load_without_engine(config, console)
    # Slow imports: errors of the folder and the address come before them.
    from prefixtune.backbone.load import load_backbone
    from prefixtune.engine.config import EngineConfig
    from prefixtune.engine.engine import Engine
    from prefixtune.engine.worker import EngineWorker
    from prefixtune.inference.decoding import newline_tokens
    from prefixtune.sampling.grammar import prepare_grammars
    from prefixtune.server.api.admin import clear_uploads
    from prefixtune.server.models.store import PrefixStore
    from prefixtune.server.state import ServerState

    engine_config = EngineConfig(
        num_slots=config.num_slots,
        max_length=config.max_length,
        prefill_tokens=config.prefill_tokens,
        # More than `Admission` ever admits: with their fair shares, a thousand tenants may hold
        # 1 + 1/2 + ... + 1/1000 = 7.5 times the queue.
        max_waiting=8 * (config.num_slots + config.max_queue),
    )
    console.info(f"loading {config.backbone} ...")
    backbone = load_backbone(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    console.info(f"{backbone!r}")
    # Callers see this name: it must not be a path.
    engine = Engine(replace(backbone, name=config.model_id), engine_config)
    console.info(
        f"{config.num_slots} texts at once, of {engine.max_length:,} positions at most, would take "
        f"{engine.max_cache_bytes / 2**30:.1f} GiB of memory besides the model"
    )
    # The engine may have replaced it, and then the first one can be freed.
    backbone = engine.backbone
    store = PrefixStore(config.prefixes, backbone, max_bytes=config.cache_mib * 2**20)
    clear_uploads(store.folder)
    # Made for the first JSON schema, it would stop all streams for a second.
    prepare_grammars(engine.backbone)
    state = ServerState(config, backbone, store, EngineWorker(engine))
    if state.training is not None:
        state.training.files.clear()
    if config.max_joined_prefixes > 1:
        try:
            # Found by trying it on the model, which no text should wait for.
            if not state.catalog.joiner.rotation().is_exact:
                console.info("joined prefixes are approximate: this model's keys cannot be moved to other positions")
        except PrefixError as error:
            console.info(f"requests cannot join prefixes: {error.message}")
    # Takes a moment, for which the first request should not wait.
    state.tokenizer_thread.submit(newline_tokens, backbone)
    return state


def _load_without_engine(config: ServeConfig, console: Console) -> ServerState:
    from prefixtune.backbone.unloaded import load_tokenizer
    from prefixtune.server.api.admin import clear_uploads
    from prefixtune.server.models.store import PrefixStore
    from prefixtune.server.state import ServerState

    console.info(f"loading the tokenizer of {config.backbone} ...")
    backbone = replace(load_tokenizer(config.backbone), name=config.model_id)
    store = PrefixStore(config.prefixes, backbone, max_bytes=config.cache_mib * 2**20)
    clear_uploads(store.folder)
    state = ServerState(config, backbone, store, None)
    if state.training is not None:
        state.training.files.clear()
    return state


def _report_start(state: ServerState, console: Console, listener: socket.socket) -> None:
    config, store = state.config, state.store
    refused = store.refused
    for name, reason in list(refused.items())[:_MAX_WARNINGS]:
        console.warn(f"{name} is not served: {reason}")
    if len(refused) > _MAX_WARNINGS:
        console.warn(f"{len(refused) - _MAX_WARNINGS} more files are not served; GET /admin/prefixes lists them")
    if config.model_id in store:
        console.warn(f"the prefix {config.model_id!r} is hidden by the bare backbone; set backbone_id")
    if not config.keys:
        console.warn("no key is configured: only this machine may use the server")
    host = f"[{config.host}]" if ":" in config.host else config.host
    is_page = config.playground and state.has_engine
    url = config.host if config.socket_file else f"http://{host}:{listener.getsockname()[1]}"
    console.info(f"serving {len(store)} prefixes on {url}" + (" (open it in a browser)" if is_page else ""))
    log("started", url=url, prefixes=len(store), refused=len(refused), keys=len(config.keys))


class FolderWatch:
    """Says when to look at the folder of prefixes again.

    Args:
        folder: It.
        interval: Seconds after which to look whatever happened; 0: never for that.
        by_time: Whether to look when the folder's own time shows that a file has come or gone.
    """

    def __init__(self, folder: Path, interval: float, *, by_time: bool) -> None:
        self._folder, self._interval, self._by_time = folder, interval, by_time
        self.pause = min(filter(None, (interval, _WATCH_SECONDS if by_time else 0.0)), default=0.0)
        self._next_look = time.monotonic() + interval if interval else math.inf
        self._modified: int | None = None
        self._seen: int | None = None

    def is_due(self) -> bool:
        """Whether to look now.

        Raises:
            OSError: The folder is gone.
        """
        now = time.monotonic()
        self._modified = os.stat(self._folder).st_mtime_ns if self._by_time else None
        return self._modified != self._seen or now >= self._next_look

    def note_look(self) -> None:
        """Take note that the folder was looked at, after `is_due`."""
        again = self._interval or math.inf
        if self._modified != self._seen:
            # A file that comes within the same tick of the system's clock changes the time no more.
            again = min(again, _SECOND_LOOK_SECONDS)
        self._seen = self._modified
        self._next_look = time.monotonic() + again


async def watch_folder(state: ServerState) -> None:
    """Reload the folder when another replica, or a job, may have changed it; goes on whatever fails."""
    interval = state.config.reload_seconds
    watch = FolderWatch(state.store.folder, interval, by_time=state.training is not None)
    pause = watch.pause
    while watch.pause:
        await asyncio.sleep(pause)
        try:
            # After an error it is looked at once more, whatever its time says.
            if not await asyncio.to_thread(watch.is_due) and not state.folder_error:
                continue
            await asyncio.to_thread(state.store.reload)
            watch.note_look()
        except Exception as error:
            state.folder_error = "cannot be read"
            pause = max(interval, min(2 * pause, _MAX_RETRY_SECONDS))
            unexpected = None if isinstance(error, PrefixError | OSError) else error
            log("reload_failed", level=logging.WARNING, error=unexpected, reason=str(error), next_try_seconds=pause)
        else:
            state.folder_error, pause = "", watch.pause


class GracefulServer(uvicorn.Server):
    """uvicorn, with a shutdown that finishes running requests."""

    def __init__(self, state: ServerState, max_connections: int, training_worker: TrainingWorker | None = None) -> None:
        from prefixtune.server.app import make_app

        config = state.config
        self.connections = Connections.from_config(config, max_connections)
        super().__init__(
            uvicorn.Config(
                make_app(state),
                http=self.connections.protocol(),
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=math.ceil(config.keep_alive),
                timeout_graceful_shutdown=int(_FLUSH_SECONDS),
            )
        )
        self.state, self.training_worker = state, training_worker
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal stops it."""
        self.loop = asyncio.get_running_loop()
        background = [
            asyncio.ensure_future(watch_folder(self.state)),
            asyncio.ensure_future(self.connections.sweep()),
        ]
        await super().serve(sockets)
        for task in background:
            task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one starts the shutdown, the second one ends the process."""
        if self.loop is None or self.stopping is not None:
            self.should_exit = self.force_exit = True
            return
        self.loop.call_soon_threadsafe(self._start_stopping)

    def _start_stopping(self) -> None:
        if self.stopping is None:
            self.stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        state = self.state
        try:
            log("draining", requests=state.open_requests.count, texts=state.admission.texts)
            if self.training_worker is not None:
                self.training_worker.begin_stop()
            if not await state.drain(state.config.drain_seconds):
                log(
                    "gave_up",
                    level=logging.WARNING,
                    requests=state.open_requests.count,
                    texts=state.admission.texts,
                )
                await asyncio.to_thread(state.close)
                # The responses of the cancelled requests are still sent.
                await state.drain(_FLUSH_SECONDS)
        finally:
            # Whatever has failed: a server that drains takes no more requests.
            self.should_exit = True
