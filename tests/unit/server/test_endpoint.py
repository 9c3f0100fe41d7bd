"""Who is answered, with and without keys."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import bearer, completion, send
from prefixtune.server.auth import hash_key
from prefixtune.server.settings import KeyConfig


def test_without_keys_only_local_host_names_are_answered(make_server: Callable[..., Any]) -> None:
    app, _ = make_server()
    names = ("localhost", "localhost:8000", "127.0.0.1", "127.0.0.1:80", "[::1]:8000", "LOCALHOST:1")
    for host in (*names, "127.0.0.2:80", "[0:0:0:0:0:0:0:1]"):
        assert asyncio.run(send(app, "GET", "/v1/models", headers={"host": host})).status == 200
    names = ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:80")
    for host in (*names, "10.0.0.1", "[::2]", ""):
        assert asyncio.run(send(app, "GET", "/v1/models", headers={"host": host})).code == "host_not_allowed"


@pytest.mark.parametrize("name", ["X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Forwarded", "Via"])
def test_without_keys_no_proxy_is_answered(make_server: Callable[..., Any], name: str) -> None:
    app, _ = make_server()
    headers = {"host": "localhost", name.lower(): "127.0.0.1"}
    for method, path in (("GET", "/v1/models"), ("POST", "/v1/completions"), ("GET", "/metrics")):
        assert asyncio.run(send(app, method, path, completion(), headers=headers)).code == "key_needed"
    keyed, _ = make_server(keys={"me": KeyConfig(hash=hash_key("pt-me"))})
    assert asyncio.run(send(keyed, "GET", "/v1/models", headers=headers | bearer("me"))).status == 200
