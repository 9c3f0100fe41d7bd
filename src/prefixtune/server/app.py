"""All routes, as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.server.api import admin, health
from prefixtune.server.api.completions import create_chat_completion, create_completion
from prefixtune.server.api.endpoint import Endpoint, RequestContext, Right
from prefixtune.server.api.openapi import openapi_document
from prefixtune.server.api.tasks import create_task_output, describe_task
from prefixtune.server.middleware import Middleware
from prefixtune.server.playground import Playground
from prefixtune.server.responses import ApiError, json_response
from prefixtune.server.state import ServerState

__all__ = ["make_app"]


Handler = Callable[[RequestContext], Awaitable[ASGIApp]]


def make_app(state: ServerState) -> ASGIApp:
    """The application of a server."""

    async def show_document(_: RequestContext) -> ASGIApp:
        return document

    routes = _routes(state, show_document)
    document = json_response(openapi_document(routes, state.config, state.limits))
    app: ASGIApp = Router(
        [Route(path, _ByMethod(path, methods)) for path, methods in routes.items()],
        redirect_slashes=False,
        default=_unknown_path,
    )
    origins = state.config.cors_origins
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=("retry-after", "x-request-id"),
        )
    return Middleware(app, state.metrics, with_cors=bool(origins))


def _routes(state: ServerState, show_document: Handler) -> dict[str, dict[str, ASGIApp]]:
    """Path -> method -> application."""

    def endpoint(handler: Handler, right: Right = "key") -> Endpoint:
        return Endpoint(handler, state, right=right)

    def generating(handler: Handler) -> Endpoint:
        return Endpoint(handler, state, limited=True)

    routes: dict[str, dict[str, ASGIApp]] = {
        "/v1/models": {"GET": endpoint(list_models)},
        "/v1/models/{name:path}": {"GET": endpoint(show_model)},
        "/v1/completions": {"POST": generating(create_completion)},
        "/v1/chat/completions": {"POST": generating(create_chat_completion)},
        "/v1/tasks/{name:path}": {"GET": endpoint(describe_task), "POST": generating(create_task_output)},
        "/v1/status": {"GET": endpoint(health.show_status)},
        "/admin/prefixes": {"GET": endpoint(admin.list_prefixes, "admin")},
        "/admin/prefixes/{name}": {
            "GET": endpoint(admin.inspect_prefix, "admin"),
            "PUT": endpoint(admin.upload_prefix, "admin"),
            "POST": endpoint(admin.upload_prefix, "admin"),
            "DELETE": endpoint(admin.delete_prefix, "admin"),
        },
        "/admin/reload": {"POST": endpoint(admin.reload_prefixes, "admin")},
        "/healthz": {"GET": health.Health(state, ready=False)},
        "/readyz": {"GET": health.Health(state, ready=True)},
        "/metrics": {"GET": endpoint(health.show_metrics, "metrics")},
        "/openapi.json": {"GET": endpoint(show_document)},
    }
    if state.config.playground:
        routes["/"] = {"GET": Playground()}
    return routes


async def list_models(context: RequestContext) -> ASGIApp:
    """`GET /v1/models`."""
    models = await asyncio.to_thread(context.state.catalog.describe_all, context.caller)
    return json_response({"object": "list", "data": models})


async def show_model(context: RequestContext) -> ASGIApp:
    """`GET /v1/models/{name}`."""
    context.state.catalog.check_access(context.name, context.caller)
    return json_response(context.state.catalog.describe(context.name))


class _ByMethod:
    """The applications of one path, by method."""

    def __init__(self, path: str, methods: Mapping[str, ASGIApp]) -> None:
        self.route = path.replace(":path", "")
        self.methods = {**methods, **({"HEAD": methods["GET"]} if "GET" in methods else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["log_fields"]["route"] = self.route
        app = self.methods.get(scope["method"])
        if app is None:
            allowed = ", ".join(sorted(self.methods))
            message = f"{self.route} allows {allowed}."
            app = ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}).response()
        await app(scope, receive, send)


async def _unknown_path(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return
    await ApiError(404, "there is nothing at this path.", code="unknown_path").response()(scope, receive, send)
