"""The parts of a running server, put together once.

Knows nothing of routes.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor

from prefixtune.backbone.backbone import Backbone
from prefixtune.engine.engine import Engine
from prefixtune.engine.worker import EngineWorker
from prefixtune.server.addresses import Addresses, PerAddress
from prefixtune.server.auth import Keyring
from prefixtune.server.limits import Admission, Limits, Shares, Turns
from prefixtune.server.metrics import Metrics
from prefixtune.server.models.catalog import Catalog
from prefixtune.server.models.store import PrefixStore
from prefixtune.server.settings import ServeConfig

__all__ = ["ServerState"]


class ServerState:
    """What the endpoints work with.

    Args:
        config: What was asked for.
        backbone: The model.
        store: Its prefixes.
        worker: The engine, running.
    """

    def __init__(self, config: ServeConfig, backbone: Backbone, store: PrefixStore, worker: EngineWorker) -> None:
        self.config, self.backbone, self.store, self.worker = config, backbone, store, worker
        self.begun = time.time()
        self.catalog = Catalog(store, backbone, config.model_id, int(self.begun))
        self.keyring = Keyring(config.keys)
        self.addresses = Addresses(config.proxies)
        self.per_address = PerAddress(config.max_connections_per_address)
        self.bodies = Shares(config.max_pending_mib * 2**20)
        self.turns = Turns()
        self.admission = Admission(config.num_slots, config.max_queue)
        self.limits = Limits(config.max_tokens, config.max_texts)
        self.draining = False
        # Why the folder of prefixes was not read the last time; without paths, as anybody is told.
        self.folder_error = ""
        self.metrics = Metrics(
            worker,
            store,
            num_slots=config.num_slots,
            most_prefixes=config.metric_prefixes,
            draining=lambda: self.draining,
        )
        # One at a time: a tokenizer's settings are not made for several threads.
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="prefixtune-tokenizer")

    @property
    def engine(self) -> Engine:
        """The running engine, which may be another one later."""
        return self.worker.engine

    async def drain(self, seconds: float) -> bool:
        """Take no more requests, and wait until the running ones are answered; False: some were not in time."""
        self.draining = True
        try:
            async with asyncio.timeout(seconds):
                await self.admission.idle()
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Stop the engine; what still runs is given up."""
        self.worker.close()
        self.tokenizing.shutdown(wait=False, cancel_futures=True)
