"""All routes, as one application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.staticfiles import StaticFiles

from prefixtune import __version__
from prefixtune.server import playground
from prefixtune.server.api import classify, completions, files, fine_tuning, health, models, tasks
from prefixtune.server.middleware import Middleware
from prefixtune.server.responses import JsonAnswer, handle_errors
from prefixtune.server.state import ServerState

DESCRIPTION = (
    "One frozen language model and many prefixes. /v1/models, /v1/completions and /v1/chat/completions are OpenAI's; "
    "/v1/tasks takes the fields of a prefix's own task. A name such as manual+style means prefixes that are joined. "
    "Every GET is also a HEAD."
)
_ROUTERS = (models.router, files.router, fine_tuning.router, health.public, health.router)
_ENGINE_ROUTERS = (completions.router, tasks.router, classify.router, health.engine_router)
"""What a server without an engine does not have."""


def make_app(state: ServerState) -> FastAPI:
    """The application of a server."""
    config = state.config
    app = with_routes(pages=config.playground, has_engine=state.has_engine)
    app.state.server = state
    handle_errors(app)
    app.add_middleware(Middleware, state=state)
    # The last one is the outermost: pages of other origins may read unexpected errors, too.
    if config.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=config.cors_origins,
            allow_methods=("GET", "POST", "DELETE"),
            # Clients send many of their own, as OpenAI's: x-stainless-os, idempotency-key.
            allow_headers=("*",),
            expose_headers=("*",),
        )
    return app


def with_routes(*, pages: bool = True, has_engine: bool = True) -> FastAPI:
    """An application with the routes of a server, and the document that describes them."""
    options: dict[str, Any] = {"openapi_url": None, "docs_url": None, "redoc_url": None, "redirect_slashes": False}
    app = FastAPI(
        title="prefixtune",
        version=__version__,
        description=DESCRIPTION,
        default_response_class=JsonAnswer,
        responses={"4XX": {"description": "An error, in OpenAI's shape."}},
        generate_unique_id_function=lambda route: route.name,
        **options,
    )
    for router in (*_ROUTERS, *(_ENGINE_ROUTERS if has_engine else ())):
        app.include_router(router)
    if pages:
        app.include_router(playground.router)
        # Swagger UI.
        app.mount("/docs", StaticFiles(packages=[("fastapi_offline", "static")]))
        if has_engine:
            app.include_router(playground.start)
    return app
