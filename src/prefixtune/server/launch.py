"""Start and stop a server: load the model, listen, serve, and shut down in good order.

After the first SIGTERM or SIGINT new requests get 503 and `/readyz` says so; running ones may finish within a limit;
then the process exits with 0. A second signal ends it at once. If the engine fails, its requests get 503, and the
process exits with 1.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import shlex
import socket
from dataclasses import replace
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from prefixtune.errors import ConfigError, PrefixError
from prefixtune.prefix.chat_format import allow_named
from prefixtune.server.logs import configure_logging, log
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training_worker import STOP_SECONDS, TrainingWorker, start_worker
from prefixtune.utils.console import Console
from prefixtune.utils.files import remove_abandoned

if TYPE_CHECKING:
    from prefixtune.engine.base import Engine
    from prefixtune.server.state import ServerState


_FLUSH_SECONDS = 5.0
"""Time to send the last responses, once all texts have ended or were cancelled."""
_KEEP_ALIVE_SECONDS = 75
"""How long a connection may wait for its next request."""
_MAX_WARNINGS = 10
"""Refused files that are named at the start."""


def run(config: ServeConfig, console: Console) -> int:
    """Serve until a signal stops it; returns the exit code.

    Raises:
        ConfigError: The folder of prefixes is missing or cannot be read, or the address is in use.
        BackboneError: The model cannot be loaded or served.
    """
    try:
        os.listdir(config.prefixes)
    except OSError as error:
        message = f"the folder of prefixes {config.prefixes!r} cannot be read: {error.strerror}."
        raise ConfigError(message, hint="create it, and put prefix files there, as NAME.safetensors.") from None
    with _bind(config) as listener, contextlib.closing(_load(config, console)) as state:
        configure_logging(config.log_level)
        _report_start(state, console, listener)
        training_worker = start_worker(config, state.training)
        server = GracefulServer(state, training_worker)
        try:
            # Else each full collection looks at a million objects of torch, and stops all threads meanwhile.
            gc.collect()
            gc.freeze()
            server.run(sockets=[listener])
        finally:
            if training_worker is not None:
                training_worker.stop(0.0 if server.force_exit else STOP_SECONDS)
    failed = state.has_engine and state.worker.failed
    log("stopped", level=logging.ERROR if failed else logging.INFO)
    # A supervisor starts it again: on a GPU, nothing works any more in this process.
    return 1 if failed else 0


# --- the model --------------------------------------------------------------------------------------------------------


def _load(config: ServeConfig, console: Console) -> ServerState:
    # Slow imports: errors of the folder and the address come before them.
    from prefixtune.backbone.load import load_tokenizer
    from prefixtune.inference.prompts import newline_tokens
    from prefixtune.server.prefixes import PrefixFolder
    from prefixtune.server.state import ServerState

    for file in config.chat_templates:
        allow_named(file, ())
    worker = None
    if config.engine == "none":
        console.info(f"loading the tokenizer of {config.backbone} ...")
        backbone = replace(load_tokenizer(config.backbone), name=config.model_id)
    else:
        worker = (_start_torch if config.engine == "torch" else _start_other)(config, console)
        backbone = worker.backbone
        console.info(f"{config.num_slots} texts at once, of {worker.max_length:,} positions at most (fewer take less)")
    store = PrefixFolder(config.prefixes, backbone, max_bytes=config.cache_mib * 2**20)
    # Those of another replica that serves the same folder are locked.
    remove_abandoned(store.folder)
    state = ServerState(config, backbone, store, worker)
    if worker is not None:
        # Both take a moment, for which the first request should not wait.
        state.tokenizer_thread.submit(newline_tokens, backbone)
        with contextlib.suppress(PrefixError):
            if config.max_joined_prefixes > 1 and not backbone.rotation.is_exact:
                console.info("joined prefixes are approximate: this model's keys cannot be moved to other positions")
    return state


def _start_torch(config: ServeConfig, console: Console) -> Engine:
    from prefixtune.backbone.load import load_backbone
    from prefixtune.engine.config import EngineConfig
    from prefixtune.engine.engine import TorchEngine
    from prefixtune.sampling.grammar import grammar_tokenizer

    console.info(f"loading {config.backbone} ...")
    backbone = load_backbone(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    console.info(f"{backbone!r}")
    same = ("num_slots", "max_length", "prefill_tokens", "kv_cache_mib")
    engine_config = EngineConfig(**{name: getattr(config, name) for name in same})
    # Callers see this name: it must not be a path.
    engine = TorchEngine(replace(backbone, name=config.model_id), engine_config)
    # Made for the first JSON schema, it would stop all streams for a second. If it fails, that schema is refused.
    with contextlib.suppress(PrefixError):
        grammar_tokenizer(engine.backbone)
    return engine


def _start_other(config: ServeConfig, console: Console) -> Engine:
    from prefixtune.backbone.shapes import load_shapes
    from prefixtune.engine.start import start_engine

    same = ("num_slots", "max_length", "gguf", "threads", "dtype", "cache_mib")
    given: dict[str, Any] = {name: getattr(config, name) for name in same}
    given |= {"python": config.vllm_python, "url": config.vllm_url, "folder": config.vllm_folder}
    try:
        given["arguments"] = tuple(shlex.split(config.vllm_args))
    except ValueError as error:
        raise ConfigError(f"vllm_args is {config.vllm_args!r}: {error}.", hint="close every quote.") from error
    backbone = load_shapes(config.backbone)
    console.info(f"connecting to vLLM at {config.vllm_url} ..." if config.vllm_url else f"starting {config.engine} ...")
    engine = start_engine(config.engine, backbone, **given)
    # Callers see this name: it must not be a path.
    engine.backbone = replace(engine.backbone, name=config.model_id)
    console.info(f"{engine.name} runs")
    return engine


def _report_start(state: ServerState, console: Console, listener: socket.socket) -> None:
    config, names, refused = state.config, state.store.names(), state.store.refused
    for name, reason in list(refused.items())[:_MAX_WARNINGS]:
        console.warn(f"{name} is not served: {reason}")
    if not config.keys:
        console.warn("no key is configured: only this machine may use the server")
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    has_page = config.playground and state.has_engine
    console.info(f"serving {len(names)} prefixes on {url}" + " (open it in a browser)" * has_page)
    if state.training is not None:
        console.info(f"uploaded files and jobs are in {state.training.folder.root} (--data-folder)")
    log("started", url=url, prefixes=len(names), refused=len(refused), keys=len(config.keys))


# --- the address ------------------------------------------------------------------------------------------------------


def _bind(config: ServeConfig) -> socket.socket:
    """A socket on the server's address; it does not listen yet.

    Raises:
        ConfigError: The address cannot be used.
    """
    made = None
    try:
        found = socket.getaddrinfo(config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = found[0]
        made = socket.socket(family, kind, protocol)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        if made is not None:
            made.close()
        message = f"cannot listen on {config.host} port {config.port}: {error.strerror or error}."
        raise ConfigError(message, hint="choose another --port or --host.") from error
    return made


# --- the end ----------------------------------------------------------------------------------------------------------


class GracefulServer(uvicorn.Server):
    """uvicorn, with a shutdown that finishes running requests."""

    def __init__(self, state: ServerState, training_worker: TrainingWorker | None = None) -> None:
        from prefixtune.server.app import make_app

        super().__init__(
            uvicorn.Config(
                make_app(state),
                http="h11",
                log_config=None,
                access_log=False,
                lifespan="off",
                ws="none",
                server_header=False,
                proxy_headers=False,
                limit_concurrency=state.config.max_connections,
                timeout_keep_alive=_KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=int(_FLUSH_SECONDS),
            )
        )
        self.state, self.training_worker = state, training_worker
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal stops it."""
        self.loop = asyncio.get_running_loop()
        if self.state.has_engine:
            self.state.worker.on_failure = self._stop_soon
            if self.state.worker.failed:
                self._stop_soon()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Handle a signal: the first one starts the shutdown, the second one ends the process."""
        if self.loop is None or self.stopping is not None:
            self.should_exit = self.force_exit = True
        else:
            self._stop_soon()

    def _stop_soon(self) -> None:
        """Start the shutdown, from any thread."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self._start_stopping)

    def _start_stopping(self) -> None:
        if self.stopping is None:
            self.stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        state = self.state
        try:
            log("draining", requests=state.num_open, texts=state.gate.count)
            if self.training_worker is not None:
                self.training_worker.begin_stop()
            if not await state.drain(state.config.drain_seconds):
                log("gave_up", level=logging.WARNING, requests=state.num_open, texts=state.gate.count)
                await asyncio.to_thread(state.close)
                # The responses of the cancelled requests are still sent.
                await state.drain(_FLUSH_SECONDS)
        finally:
            # Whatever has failed: a server that drains takes no more requests.
            self.should_exit = True
