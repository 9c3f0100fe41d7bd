"""The parts of a running server, put together once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.base import Engine
from prefixtune.engine.engine import DEFAULT_MAX_LENGTH
from prefixtune.server.auth import Gate, Keyring
from prefixtune.server.catalog import Catalog
from prefixtune.server.metrics import Metrics
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig
from prefixtune.server.training import Training

_T = TypeVar("_T")


class ServerState:
    """What the endpoints work with.

    Attributes:
        config: The server's configuration.
        backbone: The model; without an engine it has no weights.
        store: Its prefixes.
        has_engine: Whether it generates.
        catalog: The models by name, as a caller may see them.
        keyring: The keys.
        num_open: Requests that are being answered, whatever they wait for.
        gate: The texts that are prepared, wait or run.
        metrics: All metrics.
        training: Files and jobs; None: this server takes none.
        tokenizer_thread: Where texts are tokenized, one at a time.
        draining: Whether the server is shutting down.
        closed: Whether it has stopped: nothing is computed any more.
        started: When the server started, in seconds since 1970.
    """

    def __init__(self, config: ServeConfig, backbone: Backbone, store: PrefixFolder, worker: Engine | None) -> None:
        self.config, self.backbone, self.store, self._worker = config, backbone, store, worker
        self.has_engine = worker is not None
        self.started, self.num_open = time.time(), 0
        self.draining = self.closed = False
        self.keyring = Keyring(config.keys)
        limits = (limit for limit in (config.max_length, backbone.max_positions) if limit)
        max_length = worker.max_length if worker else min(limits, default=DEFAULT_MAX_LENGTH)
        self.catalog = Catalog(store, config, max_length)
        self.gate = Gate(config.num_slots + config.max_queue, max(1, len(config.keys)))
        # Of their own: requests that wait for the disk leave the other threads to all else.
        self._loading = ThreadPoolExecutor(self.gate.limit, thread_name_prefix="prefixtune-loading")
        self.metrics = Metrics(config, worker, store)
        self.training = Training(config) if config.takes_jobs else None
        # One thread: tokenizers keep settings that several threads would overwrite.
        self.tokenizer_thread = ThreadPoolExecutor(1, thread_name_prefix="prefixtune-tokenizer")

    async def run_loading(self, work: Callable[..., _T], *arguments: Any) -> _T:
        """What a function of the catalog returns that may load prefixes."""
        return await asyncio.get_running_loop().run_in_executor(self._loading, work, *arguments)

    @property
    def worker(self) -> Engine:
        """The engine, in its thread."""
        assert self._worker is not None, "the server has no endpoint that needs an engine"
        return self._worker

    async def drain(self, seconds: float) -> bool:
        """Accept no more work, and wait until all requests are answered; False: some were not in time."""
        self.draining, end = True, time.monotonic() + seconds
        while self.num_open and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return not self.num_open

    def close(self) -> None:
        """Stop the engine and the checks of files; what still runs is cancelled."""
        self.closed = True
        if self._worker is not None:
            self._worker.close()
        self.tokenizer_thread.shutdown(wait=False)
        self._loading.shutdown(wait=False)
        if self.training is not None:
            self.training.close()
