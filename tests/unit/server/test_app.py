"""The application: its routes, its document, and pages of other origins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import bearer, send
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def test_pages_of_other_origins_need_cors_origins(make_server: Callable[..., Any]) -> None:
    headers = {"origin": "https://a.example"}
    response = asyncio.run(send(make_server()[0], "GET", "/v1/models", headers=headers))
    assert "access-control-allow-origin" not in response.headers
    app, _ = make_server(cors_origins=("https://a.example",))
    response = asyncio.run(send(app, "GET", "/v1/models", headers=headers))
    assert response.headers["access-control-allow-origin"] == "https://a.example"
    response = asyncio.run(send(app, "GET", "/v1/models", headers={"origin": "https://b.example"}))
    assert "access-control-allow-origin" not in response.headers


def test_a_page_may_use_openais_client(make_server: Callable[..., Any]) -> None:
    app, _ = make_server(cors_origins=("https://a.example",))
    sent = "authorization,content-type,idempotency-key,x-stainless-os,x-stainless-retry-count"
    headers = {
        "origin": "https://a.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": sent,
    }
    response = asyncio.run(send(app, "OPTIONS", "/v1/chat/completions", headers=headers))
    assert (response.status, response.headers["access-control-allow-headers"]) == (200, sent)
    response = asyncio.run(send(app, "GET", "/v1/models", headers={"origin": "https://a.example"}))
    assert "x-should-retry" in response.headers["access-control-expose-headers"]


def test_the_openapi_document_has_every_route_and_no_other(make_server: Callable[..., Any]) -> None:
    for playground in (True, False):
        app, _ = make_server(playground=playground)
        document = asyncio.run(send(app, "GET", "/openapi.json")).json
        documented = {path: {method.upper() for method in methods} for path, methods in document["paths"].items()}
        routes: dict[str, set[str]] = {}
        for route in (route for route in app.routes if route.include_in_schema):
            routes.setdefault(route.path_format, set()).update(route.methods)
        assert documented == routes
        assert ("/" in documented) is ("/docs" in documented) is playground
    keys = {
        "me": KeyConfig(hash=hash_key("pt-me"), prefixes=()),
        "boss": KeyConfig(hash=hash_key("pt-boss"), admin=True),
    }
    app, _ = make_server(keys=keys)
    # Every key may read it, as the list of models.
    assert asyncio.run(send(app, "GET", "/openapi.json")).code == "invalid_api_key"
    document = asyncio.run(send(app, "GET", "/openapi.json", headers=bearer("me"))).json
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            response = asyncio.run(send(app, method.upper(), path.replace("{name}", "a")))
            assert (response.status == 401) is bool(operation.get("security")), path
            weak = asyncio.run(send(app, method.upper(), path.replace("{name}", "a"), headers=bearer("me")))
            if "right" in operation.get("description", ""):
                assert weak.code in ("admin_key_needed", "metrics_not_allowed")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/chat/completions", "did you mean /v1/chat/completions? Set the client's base URL to"),
        ("/v1/v1/completions", "did you mean /v1/completions? Set the client's base URL to"),
        ("/v1/completions/", "did you mean /v1/completions?"),
        ("/v1/classify", "did you mean /classify?"),
        ("/v2/completions", "/openapi.json lists what there is."),
    ],
)
def test_a_wrong_address_gets_the_right_one(make_server: Callable[..., Any], path: str, words: str) -> None:
    response = asyncio.run(send(make_server()[0], "POST", path, {}))
    assert (response.status, response.code) == (404, "unknown_path")
    assert words in response.json["error"]["message"]
