"""The outermost layer: unexpected errors."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import completion, send, texts_when_done


def test_details_of_an_unexpected_error_are_only_in_the_log(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    app, state = make_server()

    def fail(*_: Any) -> Any:
        raise ValueError("a secret of /srv/models")

    monkeypatch.setattr(state.catalog, "files", fail)
    with caplog.at_level(logging.ERROR, "prefixtune.server"):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(), headers={"x-request-id": "mine-1"}))
    assert (response.status, response.code) == (500, "internal_error")
    assert "secret" not in response.body.decode()
    assert "mine-1" in response.json["error"]["message"]
    assert response.headers["x-request-id"] == "mine-1"
    (record,) = caplog.records
    assert "a secret" in str(record.exc_info)
    assert texts_when_done(state) == 0
