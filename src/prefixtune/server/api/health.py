"""How the server is doing: for load balancers, for Prometheus and for the playground."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from fastapi import Request, Response
from fastapi.responses import PlainTextResponse

from prefixtune.jobs.queue import JobQueue
from prefixtune.server.api.endpoint import KeyContext, MetricsContext
from prefixtune.server.api.openapi import api_router
from prefixtune.server.api.schemas import Health, Status
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.responses import ApiError, json_response
from prefixtune.server.state import ServerState

__all__ = ["engine_router", "public", "router"]


_JOBS_SECONDS = 2.0
"""Longest wait for the number of jobs."""
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Not ready."}}
router = api_router(401, 403, 500)
engine_router = api_router(401, 403, 500)
"""For servers with an engine."""
public = api_router(500)
"""For everybody."""


@public.get("/healthz", response_model=Health, responses=_NOT_READY)
async def is_alive(request: Request) -> Response:
    """Whether the engine runs."""
    return _health(request.app.state.server, ready=False)


@public.get("/readyz", response_model=Health, responses=_NOT_READY)
async def is_ready(request: Request) -> Response:
    """Whether requests are accepted."""
    return _health(request.app.state.server, ready=True)


def _health(state: ServerState, *, ready: bool) -> Response:
    healthy, status = not state.has_engine or state.worker.healthy, "ok"
    if not healthy:
        status = "the engine is restarting"
    elif ready and state.draining:
        healthy, status = False, "shutting down"
    # Prefixes in memory are still served: a folder that cannot be read is no reason to remove the server.
    folder = state.folder_error or "ok"
    return json_response({"status": status, "folder": folder}, 200 if healthy else 503)


@router.get("/metrics", response_class=PlainTextResponse)
async def show_metrics(context: MetricsContext) -> Response:
    """Metrics for Prometheus.

    Needs a key with the right 'metrics'.
    """
    state = context.state
    if state.training is not None and state.training.is_used:
        # A database that is away, or slow, hides no other metric.
        with contextlib.suppress(ApiError, TimeoutError):
            async with asyncio.timeout(_JOBS_SECONDS):
                state.metrics.count_jobs(job.status for job in await state.training.ask(JobQueue.unfinished))
    return Response(state.metrics.render(), headers={"content-type": CONTENT_TYPE})


@engine_router.get("/v1/status", response_model=Status)
async def show_status(context: KeyContext) -> Response:
    """What runs now.

    Names of models that the caller may not use are left out.
    """
    state = context.state
    snapshot, cache = state.worker.snapshot(), state.store.stats
    running = [
        {
            "slot": sequence.slot,
            "model": sequence.prefix_name if state.catalog.may_use(sequence.prefix_name, context.caller) else None,
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
