"""All routes, as one application."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute, Match

from prefixtune import __version__
from prefixtune.errors import PrefixError
from prefixtune.server import playground
from prefixtune.server.api import (
    admin,
    classify,
    completions,
    file_preview,
    files,
    fine_tuning,
    health,
    models,
    openapi,
    tasks,
)
from prefixtune.server.api.endpoint import respond_to_error
from prefixtune.server.api.refused import refused_endpoint
from prefixtune.server.limits import QueueFull, RateLimited
from prefixtune.server.middleware import Middleware, UnexpectedErrors
from prefixtune.server.responses import ApiError, json_text
from prefixtune.server.state import ServerState

__all__ = ["DESCRIPTION", "ROUTES", "make_app"]


DESCRIPTION = (
    "One frozen language model and many prefixes. /v1/models, /v1/completions and /v1/chat/completions are OpenAI's; "
    "/v1/tasks takes the fields of a prefix's own task. A name such as manual+style means prefixes that are joined. "
    "Every GET is also a HEAD."
)


_ROUTERS = (
    models.router,
    completions.router,
    tasks.router,
    classify.router,
    files.router,
    file_preview.router,
    fine_tuning.router,
    admin.router,
    health.router,
    health.engine_router,
    health.public,
    openapi.router,
)
_ENGINE_ROUTERS = (completions.router, tasks.router, classify.router, health.engine_router)
"""What a server without an engine does not have."""
_READABLE_HEADERS = (
    *("retry-after", "x-request-id", "x-should-retry"),
    *("x-prefixtune-cut-texts", "x-prefixtune-cut-tokens", "x-prefixtune-dropped-messages"),
)
"""What pages of other origins may read of a response."""
ROUTES = [route for router in _ROUTERS for route in router.routes]
"""All routes, but for the playground's."""


def make_app(state: ServerState) -> FastAPI:
    """The application of a server."""
    config = state.config
    app = FastAPI(
        title="prefixtune",
        version=__version__,
        description=DESCRIPTION,
        routes=_routes(state),
        exception_handlers={
            **dict.fromkeys((ApiError, PrefixError, RateLimited, QueueFull), respond_to_error),
            HTTPException: _respond_to_unknown,
        },
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.state.server = state
    app.state.document = json_text(openapi.openapi_document(app, config, state.limits)).encode()
    origins = config.cors_origins
    # The first one is the innermost: pages of other origins may read its responses, too.
    app.add_middleware(UnexpectedErrors)
    if origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=("GET", "POST", "DELETE"),
            # Clients send many of their own, as OpenAI's: x-stainless-os, idempotency-key.
            allow_headers=("*",),
            expose_headers=_READABLE_HEADERS,
        )
    app.add_middleware(Middleware, metrics=state.metrics, open_requests=state.open_requests, with_cors=bool(origins))
    return app


def _routes(state: ServerState) -> list[BaseRoute]:
    pages = playground.router.routes if state.config.playground else []
    if state.has_engine:
        return [*ROUTES, *pages]
    routes = [route for router in _ROUTERS if router not in _ENGINE_ROUTERS for route in router.routes]
    return [*routes, *(page for page in pages if page is not playground.START)]


async def _respond_to_unknown(request: Request, error: Any) -> Response:
    """Nothing has this path, or not with this method."""
    if error.status_code != 405:
        if why := refused_endpoint(request.url.path):
            request.scope["log_fields"]["refused"] = "unsupported_endpoint"
            return ApiError(404, why, code="unsupported_endpoint").response()
        return ApiError(404, _explain_unknown(request), code="unknown_path").response()
    path = request.scope["route"].path_format
    routes = [route for route in request.app.routes if isinstance(route, APIRoute) and route.path_format == path]
    methods = {method for route in routes for method in route.methods or ()}
    allowed = ", ".join(sorted(methods | ({"HEAD"} if "GET" in methods else set())))
    message = f"{path} allows {allowed}."
    return ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}).response()


def _explain_unknown(request: Request) -> str:
    """Why there is nothing at a path, and the way out: usual mistakes are a slash at its end, and no or two /v1."""
    path = request.url.path
    bare = path.rstrip("/")
    for meant in (path, bare, bare.removeprefix("/v1"), f"/v1{bare}"):
        scope = {**request.scope, "path": meant}
        route = next((route for route in ROUTES if route.matches(scope)[0] is not Match.NONE), None)
        if route is None:
            continue
        if route not in request.app.routes:
            return "this server has no engine (engine = 'none'): it only trains."
        is_base = meant != bare and meant.startswith("/v1/")
        hint = " Set the client's base URL to this server's address and /v1." if is_base else ""
        return f"there is nothing at this path; did you mean {meant}?{hint}"
    return "there is nothing at this path; /openapi.json lists what there is."
