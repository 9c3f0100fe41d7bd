"""Completions and chats: white space, logprobs, and what is logged."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from asgi_client import Response, completion, send
from prefixtune.backbone.prefixes import make_header
from prefixtune.engine.request import SequenceOutput, Token
from prefixtune.prefix.artifact import save_prefix
from prefixtune.prefix.prefix import Prefix
from prefixtune.sampling.detokenizer import Detokenizer


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


@pytest.mark.parametrize(("stop", "expected"), [([], " \n one  two \n"), (["two"], " \n one  "), (["one"], " \n ")])
def test_white_space_around_a_text_is_kept_except_around_targets(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stop: list[str], expected: str
) -> None:
    app, state = make_server()
    raw, raw_state = make_server(raw_completions=True)

    def submit(request: Any, on_output: Any, deadline: Any = None) -> None:
        text = Detokenizer(state.backbone.decode, request.sampling.stop, verbatim=request.verbatim)
        for token in state.backbone.encode(" \n one  two \n"):
            piece = text.add(token)
            on_output(SequenceOutput(request.id, 0, (Token(token),), piece, "stop" if text.stopped else None))
            if text.stopped:
                return
        on_output(SequenceOutput(request.id, 0, (), text.finish(), "stop"))

    for server_state in (state, raw_state):
        monkeypatch.setattr(server_state.worker, "submit", submit)
    monkeypatch.setattr(state.backbone.tokenizer, "chat_template", "{{ messages[0]['content'] }}")

    def chat_body(model: str) -> dict[str, Any]:
        return {"model": model, "messages": [{"role": "user", "content": "hi"}], "stop": stop}

    def events(app: Any, path: str, body: dict[str, Any]) -> list[Any]:
        body = asyncio.run(send(app, "POST", path, {**body, "stream": True})).body.decode()
        return [json.loads(part[6:]) for part in body.split("\n\n")[:-2]]

    def complete(app: Any, **more: Any) -> tuple[str, str]:
        body = completion(stop=stop, **more)
        whole = asyncio.run(send(app, "POST", "/v1/completions", body)).json["choices"][0]["text"]
        return whole, "".join(event["choices"][0]["text"] for event in events(app, "/v1/completions", body))

    def chat(app: Any, model: str) -> tuple[str, str]:
        response = asyncio.run(send(app, "POST", "/v1/chat/completions", chat_body(model)))
        deltas = [event["choices"][0]["delta"] for event in events(app, "/v1/chat/completions", chat_body(model))]
        content = response.json["choices"][0]["message"]["content"]
        return content, "".join(delta.get("content", "") for delta in deltas)

    # Used as they are: prompts of the bare backbone, token ids, and all prompts with raw_completions.
    assert set(complete(app, model="tiny")) == set(complete(raw)) == {expected}
    assert set(complete(app, prompt=[5, 6])) == set(chat(app, "tiny")) == {expected}
    # A prefix's output is compared with references.
    assert set(complete(app)) == set(chat(app, "a")) == set(chat(raw, "a")) == {expected.strip()}
    task = {"name": "x", "stop": stop}
    output = asyncio.run(send(app, "POST", "/v1/tasks/a", task)).json["output"]
    assert output == expected.strip() == "".join(event.get("delta", "") for event in events(app, "/v1/tasks/a", task))


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_top_logprobs_are_decoded_outside_the_event_loop(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    app, state = make_server()
    threads, answered = set[int](), threading.Event()

    def decode(token: int) -> str:
        threads.add(threading.get_ident())
        # Others are answered meanwhile.
        assert answered.wait(20)
        return str(token)

    monkeypatch.setattr("prefixtune.server.api.choices.token_decoder", lambda _: decode)
    monkeypatch.setattr(state.backbone.tokenizer, "chat_template", "{{ messages[0]['content'] }}")
    body = completion(model="tiny", max_tokens=20)
    if "chat" in path:
        body = {**body, "messages": [{"role": "user", "content": "hi"}], "logprobs": True, "top_logprobs": 20}
        del body["prompt"]
    else:
        body["logprobs"] = 20

    async def both() -> tuple[Response, Response]:
        running = asyncio.ensure_future(send(app, "POST", path, body))
        async with asyncio.timeout(20):
            while not threads:
                await asyncio.sleep(0.001)
            other = await send(app, "GET", "/healthz")
        answered.set()
        return await running, other

    response, other = asyncio.run(both())
    assert (response.status, other.status) == (200, 200)
    assert threading.get_ident() not in threads


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


@pytest.mark.parametrize("target", [" {target} ", "<<{target}>>"])
def test_offsets_of_tokens_count_within_the_target(
    make_server: Callable[..., Any],
    backbone: Any,
    text_format: dict[str, str],
    random_prefix: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    target: str,
) -> None:
    app, state = make_server()
    header = make_header(backbone, task="records", text_format={**text_format, "target": target})
    save_prefix(state.store.folder / "p.safetensors", Prefix(random_prefix(backbone, 4, 5).layers, header))
    expected = "Aromi is  it."
    ids = backbone.encode_sources(["  " + target.replace("{target}", expected) + "  "])[0]
    pieces = [backbone.tokenizer.decode([token]) for token in ids]

    def write(request: Any, on_output: Any, deadline: Any = None) -> None:
        # As the engine does, which leaves out the white space around a text.
        text = Detokenizer(backbone.decode, verbatim=request.verbatim)
        for token in ids:
            on_output(SequenceOutput(request.id, 0, (Token(token, -1.0),), text.add(token)))
        on_output(SequenceOutput(request.id, 0, (), text.finish(), "length"))

    monkeypatch.setattr(state.worker, "submit", write)
    begin = "".join(pieces).index(expected)
    starts = [len("".join(pieces[:number])) - begin for number in range(len(pieces))]
    offsets = [min(max(start, 0), len(expected)) for start in starts]
    whole = asyncio.run(send(app, "POST", "/v1/completions", completion(model="p", logprobs=0))).json["choices"][0]
    assert whole["text"] == expected
    assert whole["logprobs"]["tokens"] == pieces
    assert whole["logprobs"]["text_offset"] == offsets
    streamed = asyncio.run(send(app, "POST", "/v1/completions", completion(model="p", logprobs=0, stream=True)))
    events = [json.loads(event[6:]) for event in streamed.body.decode().split("\n\n") if event.startswith("data: {")]
    choices = [event["choices"][0] for event in events]
    assert "".join(choice["text"] for choice in choices) == expected
    parts = [choice["logprobs"] for choice in choices if choice["logprobs"]]
    assert [token for part in parts for token in part["tokens"]] == pieces
    assert [offset for part in parts for offset in part["text_offset"]] == offsets


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
