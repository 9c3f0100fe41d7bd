"""How the server fares: for load balancers, for Prometheus, and for who looks at the page."""

from __future__ import annotations

import time
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.server.endpoint import Call
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.replies import reply
from prefixtune.server.services import Services

__all__ = ["Health", "metrics", "status"]


class Health:
    """`/healthz` and `/readyz`, for whoever asks.

    Args:
        services: The server's parts.
        ready: Ask whether requests are taken, too, and not only whether the server is alive.
    """

    def __init__(self, services: Services, *, ready: bool) -> None:
        self.services, self.ready = services, ready

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with a word on it."""
        good, word = self.services.worker.healthy, "ok"
        if not good:
            word = "the engine is being made anew"
        elif self.ready and self.services.draining:
            good, word = False, "about to stop"
        await reply({"status": word}, 200 if good else 503)(scope, receive, send)


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
