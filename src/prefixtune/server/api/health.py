"""How the server fares: for load balancers, for Prometheus, and for the page; and the watch over its folder."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.errors import PrefixError
from prefixtune.server.api.endpoint import Call
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.middleware import log
from prefixtune.server.responses import reply
from prefixtune.server.state import ServerState

__all__ = ["Health", "look_for_files", "metrics", "status"]


_LONGEST_PAUSE = 60.0
"""Seconds between looks at a folder that cannot be read, unless they are longer anyway."""


class Health:
    """`/healthz` and `/readyz`, for whoever asks.

    Args:
        services: The server's parts.
        ready: Ask whether requests are taken, too, and not only whether the server is alive.
    """

    def __init__(self, services: ServerState, *, ready: bool) -> None:
        self.services, self.ready = services, ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a word on it."""
        good, word = self.services.worker.healthy, "ok"
        if not good:
            word = "the engine is being made anew"
        elif self.ready and self.services.draining:
            good, word = False, "about to stop"
        # What is in memory is served on: a folder that cannot be read is no reason to be taken out of service.
        folder = self.services.folder_error or "ok"
        await reply({"status": word, "folder": folder}, 200 if good else 503)(scope, receive, send)


async def look_for_files(services: ServerState) -> None:
    """See from time to time what others, such as another replica, did to the folder; whatever fails, go on."""
    pause = seconds = services.config.reload_seconds
    while seconds:
        await asyncio.sleep(pause)
        try:
            await asyncio.to_thread(services.store.reload)
        except Exception as error:
            services.folder_error = "cannot be read"
            pause = max(seconds, min(2 * pause, _LONGEST_PAUSE))
            bug = error if not isinstance(error, PrefixError) else None
            log("reload_failed", level=logging.WARNING, error=bug, reason=str(error), next_try_seconds=pause)
        else:
            services.folder_error, pause = "", seconds


async def metrics(call: Call) -> ASGIApp:
    """`GET /metrics`."""
    return Response(call.services.metrics.text(), headers={"content-type": CONTENT_TYPE})


async def status(call: Call) -> ASGIApp:
    """`GET /v1/status`: what runs now. Of models that the caller may not use, only that there is a text."""
    services = call.services
    now, cache = services.worker.snapshot(), services.store.stats
    running = [
        {
            "slot": text.slot,
            "model": text.prefix_name if call.caller.may_use(text.prefix_name) else None,
            "prompt_tokens": text.prompt_tokens,
            "new_tokens": text.new_tokens,
        }
        for text in now.running
    ]
    told: dict[str, Any] = {
        "draining": services.draining,
        "seconds": round(time.time() - services.begun, 1),
        "slots": services.config.num_slots,
        "running": running,
        "waiting": now.waiting,
        "steps": now.steps,
        "tokens": now.tokens,
        "cache": {"prefixes": cache.loaded, "bytes": cache.bytes, "hits": cache.hits, "misses": cache.misses},
    }
    return reply(told)
