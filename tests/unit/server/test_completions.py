"""Completions and chats: stop strings, logprobs, and what is logged."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import Response, completion, send


@pytest.mark.parametrize("enabled", [False, True])
def test_prompts_and_outputs_are_logged_only_on_request(
    make_server: Callable[..., Any], caplog: pytest.LogCaptureFixture, enabled: bool
) -> None:
    app, _ = make_server(log_prompts=enabled)

    def fields(path: str, **body: Any) -> tuple[Any, Response]:
        caplog.clear()
        with caplog.at_level(logging.DEBUG, "prefixtune.server"):
            response = asyncio.run(send(app, "POST", path, {"max_tokens": 20, **body}))
        (record,) = caplog.records
        assert ("a secret" in str(record.__dict__)) is enabled
        return record.__dict__["fields"].get("outputs"), response

    outputs, response = fields("/v1/tasks/a", name="a secret")
    assert outputs == ([response.json["output"]] if enabled else None)
    chat = {"model": "a", "messages": [{"role": "user", "content": "a secret"}]}
    for path, more in (("/v1/completions", completion(prompt="a secret", n=2)), ("/v1/chat/completions", chat)):
        body = {**more, "max_tokens": 20, "temperature": 0}
        whole, response = fields(path, **body)
        texts = [choice.get("text") or choice["message"]["content"] for choice in response.json["choices"]]
        assert whole == (texts if enabled else None)
        assert fields(path, **body, stream=True)[0] == whole
    assert fields("/v1/tasks/a", name="a secret", stream=True)[0] == outputs


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("stop", "finish", "count"), [(["<s>"], "stop", 0), (["<x>"], "length", 6)])
def test_a_special_token_may_be_a_stop_string(
    make_server: Callable[..., Any], raw: bool, stop: list[str], finish: str, count: int
) -> None:
    app, state = make_server(raw_completions=raw)
    # Its text is never shown.
    bias = {str(state.backbone.tokenizer.bos_token_id): 100}
    body = completion(max_tokens=6, temperature=0, logit_bias=bias, stop=stop)
    reply = asyncio.run(send(app, "POST", "/v1/completions", body)).json
    assert (reply["choices"][0]["text"].strip(), reply["choices"][0]["finish_reason"]) == ("", finish)
    assert reply["usage"]["completion_tokens"] == count


@pytest.mark.parametrize("stream", [False, True])
def test_the_log_probabilities_of_a_response_are_bounded(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    app, _ = make_server()
    monkeypatch.setattr("prefixtune.server.api.generation._MOST_LOGPROBS", 25_000)
    body = completion(model="tiny", prompt=[5] * 500, max_tokens=0, echo=True, logprobs=20, stream=stream)
    assert asyncio.run(send(app, "POST", "/v1/completions", {**body, "n": 2})).status == 200
    response = asyncio.run(send(app, "POST", "/v1/completions", {**body, "n": 3}))
    assert (response.status, response.code) == (400, "too_many_logprobs")
    assert "31,500" in response.json["error"]["message"]


def test_without_llguidance_a_response_format_is_refused_with_the_way_out(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = make_server()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion(response_format={"type": "json_object"})))
    error = response.json["error"]
    assert response.status == 400
    assert (error["param"], error["code"]) == ("response_format", "unsupported_field")
    assert "prefixtune[json]" in error["message"]


def test_models_are_described_as_vllm_does(make_server: Callable[..., Any]) -> None:
    app, _ = make_server()
    models = {model["id"]: model for model in asyncio.run(send(app, "GET", "/v1/models")).json["data"]}
    assert (models["tiny"]["root"], models["tiny"]["parent"], models["tiny"]["max_model_len"]) == ("tiny", None, 512)
    assert (models["a"]["root"], models["a"]["parent"], models["a"]["max_model_len"]) == ("a", "tiny", 508)
    joined = asyncio.run(send(app, "GET", "/v1/models/a+b")).json
    assert (joined["parent"], joined["max_model_len"]) == ("tiny", 504)
