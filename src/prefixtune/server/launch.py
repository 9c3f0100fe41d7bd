"""From a configuration to a server that runs: load, listen, serve, and stop in good order.

At the first SIGTERM or SIGINT no request is taken any more (they get 503, and `/readyz` says so), running ones are
finished within a limit, and the process exits with 0. A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from prefixtune.errors import ConfigError
from prefixtune.server.api.health import look_for_files
from prefixtune.server.connections import Connections, fit_open_files
from prefixtune.server.middleware import log, set_up_logs
from prefixtune.server.settings import ServeConfig
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.server.state import ServerState

__all__ = ["run"]


_FLUSH_SECONDS = 5.0
"""What replies have to be sent, once everything is written or given up."""
_MANY_REFUSED = 10


def run(config: ServeConfig, console: Console) -> int:
    """Serve until told to stop; returns the exit code.

    Raises:
        ConfigError: The folder of prefixes is missing, or the address is in use.
        BackboneError: The model cannot be loaded, or not be served.
    """
    folder = Path(config.prefixes)
    if not folder.is_dir():
        raise ConfigError(
            f"there is no folder of prefixes {config.prefixes!r}.",
            hint="make it, and put files NAME.safetensors of `prefixtune train` there.",
        )
    most, files = fit_open_files(config.max_connections)
    if most < config.max_connections:
        console.warn(
            f"{most} connections at once instead of {config.max_connections}: this process may open {files} files; "
            "raise that limit (ulimit -n, or LimitNOFILE of systemd), or lower max_connections"
        )
    with _bind(config) as listener:
        services = _load(config, console)
        set_up_logs(config.log_level)
        _greet(services, console, listener)
        server = _Server(services, most)
        try:
            server.run(sockets=[listener])
        finally:
            services.close()
    log("stopped")
    return 0


def _bind(config: ServeConfig) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror or error}.",
            hint="choose another --port, or 0 for any free one.",
        ) from error
    return listener


def _load(config: ServeConfig, console: Console) -> ServerState:
    # Heavy: what is wrong with the folder or the address is told without them.
    from prefixtune.backbone.load import load_backbone
    from prefixtune.engine.engine import Engine, EngineConfig
    from prefixtune.engine.worker import EngineWorker
    from prefixtune.inference.decoding import newline_tokens
    from prefixtune.server.api.admin import clear_uploads
    from prefixtune.server.models.store import PrefixStore
    from prefixtune.server.state import ServerState

    console.info(f"loading {config.backbone} ...")
    backbone = load_backbone(config.backbone, dtype=config.dtype, device=config.device, quantize=config.quantize)
    console.info(f"{backbone!r}")
    # What is told to callers names no path.
    backbone = replace(backbone, name=config.model_id)
    engine = Engine(
        backbone,
        EngineConfig(
            num_slots=config.num_slots,
            max_length=config.max_length,
            prefill_tokens=config.prefill_tokens,
            # All that are admitted may come between two steps; with their shares, tenants may hold several times the
            # queue (a thousand of them, 1 + 1/2 + ... + 1/1000 = 7.5 times).
            max_waiting=8 * (config.num_slots + config.max_queue),
        ),
    )
    # The given one may be let go.
    backbone = engine.backbone
    store = PrefixStore(config.prefixes, backbone, max_bytes=config.cache_mib * 2**20)
    clear_uploads(store.folder)
    services = ServerState(config, backbone, store, EngineWorker(engine))
    # Takes a moment; the first request that needs it should not.
    services.tokenizing.submit(newline_tokens, backbone)
    return services


def _greet(services: ServerState, console: Console, listener: socket.socket) -> None:
    config, store = services.config, services.store
    refused = store.refused
    for name, reason in list(refused.items())[:_MANY_REFUSED]:
        console.warn(f"{name} is left out: {reason}")
    if len(refused) > _MANY_REFUSED:
        console.warn(f"{len(refused) - _MANY_REFUSED} more are left out; GET /admin/prefixes lists them")
    if config.model_id in store:
        console.warn(f"the prefix {config.model_id!r} is hidden by the bare backbone; set backbone_id")
    if not config.keys:
        console.warn("no key is configured: whoever is on this machine may use the server, and nobody else")
    host = f"[{config.host}]" if ":" in config.host else config.host
    url = f"http://{host}:{listener.getsockname()[1]}"
    console.info(f"serving {len(store)} prefixes on {url}" + (" (open it in a browser)" if config.playground else ""))
    log("started", url=url, prefixes=len(store), refused=len(refused), keys=len(config.keys))


class _Server(uvicorn.Server):
    """uvicorn, with a stop that finishes what runs."""

    def __init__(self, services: ServerState, most: int) -> None:
        from prefixtune.server.app import make_app

        config = services.config
        self.connections = Connections.from_config(config, most)
        super().__init__(
            uvicorn.Config(
                make_app(services),
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
        self.services = services
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stopping: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop."""
        self.loop = asyncio.get_running_loop()
        beside = [
            asyncio.ensure_future(look_for_files(self.services)),
            asyncio.ensure_future(self.connections.sweep()),
        ]
        await super().serve(sockets)
        for task in beside:
            task.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: the first begins the end, the second is the end."""
        if self.loop is None or self.stopping is not None:
            self.should_exit = self.force_exit = True
            return
        self.loop.call_soon_threadsafe(self._begin_to_stop)

    def _begin_to_stop(self) -> None:
        if self.stopping is None:
            self.stopping = asyncio.ensure_future(self._stop())

    async def _stop(self) -> None:
        services = self.services
        log("draining", texts=services.admission.texts)
        if not await services.drain(services.config.drain_seconds):
            log("gave_up", level=logging.WARNING, texts=services.admission.texts)
            await asyncio.to_thread(services.close)
            # Those who wait are told.
            await services.drain(_FLUSH_SECONDS)
        self.should_exit = True
