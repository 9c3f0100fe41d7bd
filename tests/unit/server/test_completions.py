"""Completions: stop strings, what the server lacks, and models as vLLM's clients read them."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import completion, send


@pytest.mark.parametrize(
    ("raw", "stop", "finish", "count"),
    [(False, ["<s>"], "stop", 0), (True, ["<s>"], "stop", 0), (True, ["<x>"], "length", 6)],
)
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


def test_without_llguidance_a_response_format_is_refused_with_the_way_out(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = make_server()
    monkeypatch.setitem(sys.modules, "llguidance", None)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion(response_format={"type": "json_object"})))
    error = response.json["error"]
    assert response.status == 400
    assert (error["param"], error["code"]) == ("response_format", "unsupported_field")


def test_models_are_described_as_vllm_does(make_server: Callable[..., Any]) -> None:
    app, _ = make_server()
    models = {model["id"]: model for model in asyncio.run(send(app, "GET", "/v1/models")).json["data"]}
    assert (models["tiny"]["root"], models["tiny"]["parent"], models["tiny"]["max_model_len"]) == ("tiny", None, 512)
    assert (models["a"]["root"], models["a"]["parent"], models["a"]["max_model_len"]) == ("a", "tiny", 508)
    joined = asyncio.run(send(app, "GET", "/v1/models/a+b")).json
    assert (joined["parent"], joined["max_model_len"]) == ("tiny", 504)
