"""How the server is doing: for load balancers, for Prometheus and for the playground."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse

from prefixtune.jobs.queue import JobQueue
from prefixtune.server.api.endpoint import KeyContext, MetricsContext
from prefixtune.server.metrics import CONTENT_TYPE
from prefixtune.server.responses import ApiError, json_response
from prefixtune.server.state import ServerState

__all__ = ["engine_router", "router"]


_JOBS_SECONDS = 2.0
"""Longest wait for the number of jobs."""
router = APIRouter()
engine_router = APIRouter()
"""For servers with an engine."""


@router.get("/healthz")
async def is_alive(request: Request) -> Response:
    """Whether the engine runs."""
    return _health(request.app.state.server, ready=False)


@router.get("/readyz")
async def is_ready(request: Request) -> Response:
    """Whether requests are accepted."""
    return _health(request.app.state.server, ready=True)


def _health(state: ServerState, *, ready: bool) -> Response:
    if state.has_engine and not state.worker.healthy:
        return json_response({"status": "the engine has failed"}, 503)
    if ready and state.draining:
        return json_response({"status": "shutting down"}, 503)
    return json_response({"status": "ok"})


@router.get("/openapi.json")
async def show_interface(context: KeyContext) -> Response:
    """This document."""
    document = context.request.app.openapi()
    if context.state.keyring.is_open:
        document["components"].pop("securitySchemes", None)
        for operation in (operation for methods in document["paths"].values() for operation in methods.values()):
            operation.pop("security", None)
    return json_response(document)


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


@engine_router.get("/v1/status")
def show_status(context: KeyContext) -> dict[str, Any]:
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
    return {
        "draining": state.draining,
        "seconds": round(time.time() - state.started, 1),
        "slots": state.config.num_slots,
        "running": running,
        "waiting": snapshot.waiting,
        "steps": snapshot.steps,
        "tokens": snapshot.tokens,
        "cache": {"prefixes": cache.loaded, "bytes": cache.bytes, "hits": cache.hits, "misses": cache.misses},
    }
