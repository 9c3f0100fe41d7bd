"""The routes, put together as one ASGI application."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.server import admin, watch
from prefixtune.server.completions import chat, complete
from prefixtune.server.edge import Edge
from prefixtune.server.endpoint import Call, Endpoint
from prefixtune.server.openapi import describe
from prefixtune.server.page import Page
from prefixtune.server.replies import ApiError, reply
from prefixtune.server.services import Services
from prefixtune.server.task_calls import describe_task, do_task

__all__ = ["make_app"]


async def list_models(call: Call) -> ASGIApp:
    """`GET /v1/models`."""
    described = await asyncio.to_thread(call.services.catalog.describe_all, call.caller)
    return reply({"object": "list", "data": described})


async def show_model(call: Call) -> ASGIApp:
    """`GET /v1/models/{name}`."""
    call.services.catalog.check(call.name, call.caller)
    return reply(call.services.catalog.describe(call.name))


def make_app(services: Services) -> ASGIApp:
    """The application."""

    def counted(handle: Callable[[Call], Awaitable[ASGIApp]]) -> Endpoint:
        return Endpoint(handle, services, counted=True)

    async def show_interface(_: Call) -> ASGIApp:
        return interface

    upload = Endpoint(admin.upload_prefix, services, needs="admin")
    paths: dict[str, dict[str, ASGIApp]] = {
        "/v1/models": {"GET": Endpoint(list_models, services)},
        "/v1/models/{name:path}": {"GET": Endpoint(show_model, services)},
        "/v1/completions": {"POST": counted(complete)},
        "/v1/chat/completions": {"POST": counted(chat)},
        "/v1/tasks/{name:path}": {"GET": Endpoint(describe_task, services), "POST": counted(do_task)},
        "/v1/status": {"GET": Endpoint(watch.status, services)},
        "/admin/prefixes": {"GET": Endpoint(admin.list_prefixes, services, needs="admin")},
        "/admin/prefixes/{name}": {
            "GET": Endpoint(admin.inspect_prefix, services, needs="admin"),
            "PUT": upload,
            "POST": upload,
            "DELETE": Endpoint(admin.delete_prefix, services, needs="admin"),
        },
        "/admin/reload": {"POST": Endpoint(admin.reload_prefixes, services, needs="admin")},
        "/healthz": {"GET": watch.Health(services, ready=False)},
        "/readyz": {"GET": watch.Health(services, ready=True)},
        "/metrics": {"GET": Endpoint(watch.metrics, services, needs="metrics")},
        "/openapi.json": {"GET": Endpoint(show_interface, services)},
    }
    if services.config.playground:
        paths["/"] = {"GET": Page()}
    interface = reply(describe(paths, services.config, services.limits))
    routes = [Route(path, _ByMethod(path, methods)) for path, methods in paths.items()]
    app: ASGIApp = Router(routes, redirect_slashes=False, default=_unknown)
    origins = services.config.cors_origins
    if origins:
        app = CORSMiddleware(
            app,
            allow_origins=origins,
            allow_methods=("GET", "POST"),
            allow_headers=("authorization", "content-type"),
            expose_headers=("retry-after", "x-request-id"),
        )
    return Edge(app, services.metrics, with_cors=bool(origins))


class _ByMethod:
    """The applications of one path, by method."""

    def __init__(self, path: str, methods: Mapping[str, ASGIApp]) -> None:
        self.route = path.replace(":path", "")
        self.methods = {**methods, **({"HEAD": methods["GET"]} if "GET" in methods else {})}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope["facts"]["route"] = self.route
        app = self.methods.get(scope["method"])
        if app is None:
            allowed = ", ".join(sorted(self.methods))
            message = f"{self.route} takes {allowed}."
            app = ApiError(405, message, code="method_not_allowed", headers={"Allow": allowed}).response()
        await app(scope, receive, send)


async def _unknown(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "websocket":
        await send({"type": "websocket.close"})
        return
    await ApiError(404, "there is nothing at this path.", code="unknown_path").response()(scope, receive, send)
