"""How the server is doing: for load balancers, for Prometheus and for the playground."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from prefixtune.server.api.endpoint import KeyContext, MetricsContext, key_router
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.responses import JsonAnswer

public, router, engine_router = APIRouter(), key_router(), key_router()
"""Without a key; with one; for servers with an engine."""


@public.get("/healthz")
async def is_alive(request: Request) -> Response:
    """Whether the engine runs, or is starting again: only if it has failed for good, the process is to be replaced."""
    state = request.app.state.server
    has_failed = state.has_engine and state.worker.failed
    return JsonAnswer({"status": "the engine has failed"}, 503) if has_failed else JsonAnswer({"status": "ok"})


@public.get("/readyz")
async def is_ready(request: Request) -> Response:
    """Whether requests are accepted."""
    state = request.app.state.server
    if state.draining:
        return JsonAnswer({"status": "shutting down"}, 503)
    if state.has_engine and not state.worker.failed and not state.worker.healthy:
        return JsonAnswer({"status": "the engine is starting again"}, 503)
    return await is_alive(request)


@router.get("/openapi.json")
async def show_interface(context: KeyContext) -> Response:
    """This document."""
    return JsonAnswer(context.request.app.openapi())


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(context: MetricsContext) -> Response:
    """Metrics for Prometheus.

    Needs a key with the right 'metrics'.
    """
    return Response(context.state.metrics.render(), headers={"content-type": CONTENT_TYPE})


@engine_router.get("/v1/status")
def show_status(context: KeyContext) -> dict[str, Any]:
    """What runs now.

    Models of other keys' requests are left out.
    """
    state = context.state
    snapshot, store, admin = state.worker.snapshot(), state.store, context.caller.rules.admin
    running = [
        {
            "slot": sequence.slot,
            "model": one.prefix_name if admin or one.tenant == context.caller.name else None,
            "prompt_tokens": len(one.prompt),
            "new_tokens": sequence.new_tokens,
        }
        for sequence in snapshot.running
        for one in [sequence.request]
    ]
    return {
        "draining": state.draining,
        "seconds": round(time.time() - state.started, 1),
        "slots": state.config.num_slots,
        "running": running,
        "waiting": snapshot.waiting,
        "steps": snapshot.steps,
        "tokens": snapshot.tokens,
        "cache": {"prefixes": store.num_loaded, "bytes": store.num_bytes, "hits": store.hits, "misses": store.misses},
    }
