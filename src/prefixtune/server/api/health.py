"""How the server is doing: for load balancers, for Prometheus and for the playground; and the watch on its folder."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.errors import PrefixError
from prefixtune.server.api.endpoint import RequestContext
from prefixtune.server.logs import log
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.responses import json_response
from prefixtune.server.state import ServerState

__all__ = ["Health", "show_metrics", "show_status", "watch_folder"]


_MAX_RETRY_SECONDS = 60.0
"""Longest pause before a folder that could not be read is read again, unless `reload_seconds` is longer."""


class Health:
    """`/healthz` and `/readyz`, for everybody.

    Args:
        state: The server's parts.
        ready: Say whether requests are accepted, and not only whether the engine runs.
    """

    def __init__(self, state: ServerState, *, ready: bool) -> None:
        self.state, self.ready = state, ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the status in a few words."""
        healthy, status = self.state.worker.healthy, "ok"
        if not healthy:
            status = "the engine is restarting"
        elif self.ready and self.state.draining:
            healthy, status = False, "shutting down"
        # Prefixes in memory are still served: a folder that cannot be read is no reason to remove the server.
        folder = self.state.folder_error or "ok"
        await json_response({"status": status, "folder": folder}, 200 if healthy else 503)(scope, receive, send)


async def watch_folder(state: ServerState) -> None:
    """Reload the folder every `reload_seconds`, as another replica may change it; goes on whatever fails."""
    pause = interval = state.config.reload_seconds
    while interval:
        await asyncio.sleep(pause)
        try:
            await asyncio.to_thread(state.store.reload)
        except Exception as error:
            state.folder_error = "cannot be read"
            pause = max(interval, min(2 * pause, _MAX_RETRY_SECONDS))
            unexpected = None if isinstance(error, PrefixError) else error
            log("reload_failed", level=logging.WARNING, error=unexpected, reason=str(error), next_try_seconds=pause)
        else:
            state.folder_error, pause = "", interval


async def show_metrics(context: RequestContext) -> ASGIApp:
    """`GET /metrics`."""
    return Response(context.state.metrics.render(), headers={"content-type": CONTENT_TYPE})


async def show_status(context: RequestContext) -> ASGIApp:
    """`GET /v1/status`: what runs now. Names of models that the caller may not use are left out."""
    state = context.state
    snapshot, cache = state.worker.snapshot(), state.store.stats
    running = [
        {
            "slot": sequence.slot,
            "model": sequence.prefix_name if context.caller.may_use(sequence.prefix_name) else None,
            "prompt_tokens": sequence.prompt_tokens,
            "new_tokens": sequence.new_tokens,
        }
        for sequence in snapshot.running
    ]
    status: dict[str, Any] = {
        "draining": state.draining,
        "seconds": round(time.time() - state.started, 1),
        "slots": state.config.num_slots,
        "running": running,
        "waiting": snapshot.waiting,
        "steps": snapshot.steps,
        "tokens": snapshot.tokens,
        "cache": {"prefixes": cache.loaded, "bytes": cache.bytes, "hits": cache.hits, "misses": cache.misses},
    }
    return json_response(status)
