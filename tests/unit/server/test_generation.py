"""The engine's part of a request: failures, deadlines, and lengths."""

from __future__ import annotations

import asyncio
import errno
import json
import threading
from collections.abc import Callable
from typing import Any

import openai
import pytest
import torch

import openai_client
from asgi_client import Response, completion, send, texts_when_done
from prefixtune.errors import PrefixError, RequestError
from prefixtune.sampling.grammar import Grammar, GrammarState
from prefixtune.server.api import generation


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    runner = state.worker.engine.runner
    forward = runner.forward

    def failing(scheduled: Any) -> torch.Tensor:
        if any(work.sequence.request.prefix_name == "b" for work in scheduled):
            raise RuntimeError("NaN in /srv/models")
        return forward(scheduled)

    monkeypatch.setattr(runner, "forward", failing)

    async def one_after_the_other() -> list[Response]:
        return [
            await send(app, "POST", "/v1/completions", completion(model=name, stream=stream))
            for name in "ba"
            for stream in (False, True)
        ]

    bad, bad_stream, good, good_stream = asyncio.run(one_after_the_other())
    assert (bad.status, bad.code) == (500, "engine_error")
    # The status of a stream was sent: the error is its last event.
    assert bad_stream.status == 200
    last = bad_stream.body.decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "engine_error"
    assert bad_stream.ended
    assert b"/srv" not in bad.body + bad_stream.body
    assert good.status == 200
    assert good_stream.body.endswith(b"data: [DONE]\n\n")


class _Complex(Grammar):
    """Becomes too complex at a text's second token."""

    def __init__(self) -> None:
        pass

    def start(self) -> GrammarState:
        return _ComplexState()


class _ComplexState(GrammarState):
    def __init__(self) -> None:
        self.finished, self.count = False, 0

    def allowed(self, vocab_size: int) -> torch.Tensor:
        return torch.ones(vocab_size, dtype=torch.bool)

    def accept(self, token: int) -> None:
        self.count += 1
        if self.count == 2:
            raise RequestError("too many items.", hint="use a simpler schema.")


def test_a_schema_that_becomes_too_complex_is_400(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, _ = make_server()
    monkeypatch.setattr(generation, "compile_json_schema", lambda *_: _Complex())
    body = completion(model="tiny", response_format={"type": "json_object"})
    whole = asyncio.run(send(app, "POST", "/v1/completions", body))
    assert (whole.status, whole.code) == (400, "invalid_schema")
    stream = asyncio.run(send(app, "POST", "/v1/completions", {**body, "stream": True}))
    last = json.loads(stream.body.decode().strip().split("\n\n")[-1].removeprefix("data: "))
    assert last == whole.json
    assert last["error"]["param"] == "response_format"


def test_when_the_engine_fails_its_requests_and_later_ones_get_503(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    engine = state.worker.engine

    def broken() -> Any:
        raise RuntimeError("out of memory at 0x7f")

    monkeypatch.setattr(engine, "step", broken)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion()))
    assert (response.status, response.code) == (503, "engine_failed")
    assert response.headers["retry-after"] == "1"
    assert "0x7f" not in response.body.decode()

    for path in ("/healthz", "/readyz"):
        assert asyncio.run(send(app, "GET", path)).status == 503
    later = asyncio.run(send(app, "POST", "/v1/completions", completion()))
    assert (later.status, later.code) == (503, "engine_unavailable")


def test_a_disk_that_is_full_for_the_engine_is_507(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where llama.cpp's state of a prefix is written."""
    app, state = make_server()

    def full(*_: Any, **__: Any) -> None:
        raise PrefixError("cannot write '/srv/state'.") from OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state.worker, "submit", full)
    for stream in (False, True):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(stream=stream)))
        assert (response.status, response.code) == (507, "storage_failed")
        assert b"/srv" not in response.body
    assert state.gate.count == 0


def test_an_engine_that_is_slow_to_take_a_request_stops_no_other(
    make_server: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    app, state = make_server()
    written, submit = threading.Event(), state.worker.submit

    def slow(*args: Any, **options: Any) -> None:
        assert written.wait(10)
        submit(*args, **options)

    monkeypatch.setattr(state.worker, "submit", slow)

    async def both() -> tuple[Response, Response]:
        slow_one = asyncio.ensure_future(send(app, "POST", "/v1/completions", completion()))
        while not state.gate.count:
            await asyncio.sleep(0.005)
        other = await send(app, "GET", "/healthz")
        written.set()
        return await slow_one, other

    assert [response.status for response in asyncio.run(both())] == [200, 200]


def test_a_passed_deadline_is_504(make_server: Callable[..., Any]) -> None:
    app, state = make_server(deadline=0.1)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion(max_tokens=450, n=4)))
    assert (response.status, response.code) == (504, "deadline_exceeded")
    # OpenAI's client would try twice more by itself.
    assert response.headers["x-should-retry"] == "false"
    assert texts_when_done(state) == 0

    async def stream(client: openai.AsyncOpenAI) -> openai.APIError:
        with pytest.raises(openai.APIError) as caught:
            async for _ in await client.completions.create(**completion(max_tokens=450, n=4), stream=True):
                pass
        return caught.value

    # The status was sent: the last event says so.
    error = openai_client.ask(app, stream)
    assert (error.code, error.type) == ("deadline_exceeded", "server_error")


def test_lengths_fit_the_positions(make_server: Callable[..., Any]) -> None:
    app, state = make_server(default_max_tokens=300, max_tokens=511, raw_completions=True)
    # 512 positions, 4 of them the prefix's; the last new token takes none.
    prompt = "x" * 400

    def outcome(**more: Any) -> Response:
        return asyncio.run(send(app, "POST", "/v1/completions", completion(prompt=prompt, **more)))

    assert outcome(max_tokens=109).json["usage"] == {
        "prompt_tokens": 400,
        "completion_tokens": 109,
        "total_tokens": 509,
    }
    assert outcome(max_tokens=None).json["usage"]["completion_tokens"] == 109
    assert outcome(model="tiny", max_tokens=113).json["usage"]["completion_tokens"] == 113
    for more in ({"max_tokens": 110}, {"model": "tiny", "max_tokens": 114}, {"max_tokens": None, "min_tokens": 110}):
        assert (outcome(**more).status, outcome(**more).code) == (400, "context_length_exceeded")
    assert texts_when_done(state) == 0


def test_unknown_token_ids_are_refused(make_server: Callable[..., Any]) -> None:
    app, _ = make_server()
    for param, value in (
        *(("prompt", prompt) for prompt in ([10**9], [-1], [[5], [10**30]])),
        ("logit_bias", {"5": 1, "100000": 1}),
    ):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(**{param: value})))
        error = response.json["error"]
        assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", param)
