"""The routes, put together as one ASGI application."""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files

from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixtune.server.api import admin
from prefixtune.server.api import health as watch
from prefixtune.server.api.completions import chat, complete
from prefixtune.server.api.endpoint import Call, Endpoint
from prefixtune.server.api.openapi import describe
from prefixtune.server.api.tasks import describe_task, do_task
from prefixtune.server.middleware import Middleware
from prefixtune.server.responses import ApiError, reply
from prefixtune.server.state import ServerState

__all__ = ["Page", "make_app"]


async def list_models(call: Call) -> ASGIApp:
    """`GET /v1/models`."""
    described = await asyncio.to_thread(call.services.catalog.describe_all, call.caller)
    return reply({"object": "list", "data": described})


async def show_model(call: Call) -> ASGIApp:
    """`GET /v1/models/{name}`."""
    call.services.catalog.check(call.name, call.caller)
    return reply(call.services.catalog.describe(call.name))


def make_app(services: ServerState) -> ASGIApp:
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
    return Middleware(app, services.metrics, with_cors=bool(origins))


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


class Page:
    """The playground, as an ASGI application; made once."""

    def __init__(self) -> None:
        folder = files("prefixtune.server") / "playground"
        style, script = (folder.joinpath(name).read_text("utf-8") for name in ("style.css", "script.js"))
        page = folder.joinpath("page.html").read_text("utf-8")
        text = page.replace("/* style.css */", style).replace("/* script.js */", script)
        # Neither a script nor a style that is not these very ones runs, whatever a model writes.
        policy = (
            f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; connect-src 'self'; "
            "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.response = Response(text, media_type="text/html", headers={"content-security-policy": policy})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer with the page."""
        await self.response(scope, receive, send)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
