"""The engine's part of a request: failures, deadlines, and lengths."""

import asyncio
import json
import threading
from functools import partial

import openai
import pytest

import openai_client
from asgi_client import completion, send, texts_when_done


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(make_server, monkeypatch):
    app, state = make_server()
    runner = state.worker.runner
    forward = runner.forward

    def failing(scheduled):
        if any(work.sequence.request.prefix_name == "b" for work in scheduled):
            raise RuntimeError("NaN in /srv/models")
        return forward(scheduled)

    monkeypatch.setattr(runner, "forward", failing)

    async def one_after_the_other():
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


def test_when_the_engine_fails_its_requests_and_later_ones_get_503(make_server, monkeypatch):
    app, state = make_server()
    engine = state.worker

    def broken():
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


def test_an_engine_that_starts_again_is_alive_but_not_ready(make_server, monkeypatch):
    app, state = make_server()
    monkeypatch.setattr(type(state.worker), "healthy", False)
    assert [asyncio.run(send(app, "GET", path)).status for path in ("/healthz", "/readyz")] == [200, 503]


def test_forty_cold_prefixes_leave_threads_for_the_rest(make_server, monkeypatch):
    app, state = make_server(max_queue=64)
    go_on = threading.Event()

    def wait(work, model, *more):
        assert model != "a" or go_on.wait(10)
        return work(model, *more)

    for name in ("load", "load_header"):
        monkeypatch.setattr(state.catalog, name, partial(wait, getattr(state.catalog, name)))

    async def ask():
        cold = [asyncio.ensure_future(send(app, "POST", "/v1/completions", completion(model="a"))) for _ in range(25)]
        cold += [asyncio.ensure_future(send(app, "GET", "/v1/tasks/a")) for _ in range(20)]
        await asyncio.sleep(0.1)
        hot = await asyncio.wait_for(send(app, "POST", "/v1/completions", completion(model="b")), 5)
        go_on.set()
        return [hot, *await asyncio.gather(*cold)]

    assert {answer.status for answer in asyncio.run(ask())} == {200}


def test_an_engine_that_is_slow_to_take_a_request_stops_no_other(make_server, monkeypatch):
    app, state = make_server()
    written, submit = threading.Event(), state.worker.submit

    def slow(*args, **options):
        assert written.wait(10)
        submit(*args, **options)

    monkeypatch.setattr(state.worker, "submit", slow)

    async def both():
        slow_one = asyncio.ensure_future(send(app, "POST", "/v1/completions", completion()))
        while not state.gate.count:
            await asyncio.sleep(0.005)
        other = await send(app, "GET", "/healthz")
        written.set()
        return await slow_one, other

    assert [response.status for response in asyncio.run(both())] == [200, 200]


def test_a_passed_deadline_is_504(make_server):
    app, state = make_server(deadline=0.1)
    response = asyncio.run(send(app, "POST", "/v1/completions", completion(max_tokens=450, n=4)))
    assert (response.status, response.code) == (504, "deadline_exceeded")
    # OpenAI's client would try twice more by itself.
    assert response.headers["x-should-retry"] == "false"
    assert texts_when_done(state) == 0

    async def stream(client):
        with pytest.raises(openai.APIError) as caught:
            async for _ in await client.completions.create(**completion(max_tokens=450, n=4), stream=True):
                pass
        return caught.value

    # The status was sent: the last event says so.
    error = openai_client.ask(app, stream)
    assert (error.code, error.type) == ("deadline_exceeded", "server_error")


def test_lengths_fit_the_positions(make_server):
    app, state = make_server(max_length=64, default_max_tokens=60, max_tokens=63, raw_completions=True)

    def outcome(**more):
        return asyncio.run(send(app, "POST", "/v1/completions", completion(prompt="x" * 40, **more)))

    # 64 positions, 4 of them the prefix's; the last new token takes none.
    assert outcome(max_tokens=21).json["usage"] == {"prompt_tokens": 40, "completion_tokens": 21, "total_tokens": 61}
    assert outcome(max_tokens=None).json["usage"]["completion_tokens"] == 21
    assert outcome(model="tiny", max_tokens=25).json["usage"]["completion_tokens"] == 25
    for more in ({"max_tokens": 22}, {"model": "tiny", "max_tokens": 26}, {"max_tokens": None, "min_tokens": 22}):
        assert (outcome(**more).status, outcome(**more).code) == (400, "context_length_exceeded")
    assert texts_when_done(state) == 0
    body = {"model": "a", "messages": [{"role": "user", "content": "x" * 80}], "max_tokens": 2}
    refused = asyncio.run(send(app, "POST", "/v1/chat/completions", body))
    assert (refused.json["error"]["param"], refused.code) == ("messages", "context_length_exceeded")


def test_more_tokens_may_be_asked_for_than_are_usual(make_server):
    app, _ = make_server()
    # Those of its task are 100.
    answer = asyncio.run(send(app, "POST", "/v1/completions", completion(max_tokens=None, min_tokens=105)))
    assert answer.json["usage"]["completion_tokens"] == 105


def test_the_log_probabilities_of_a_response_are_bounded(make_server, monkeypatch):
    app, _ = make_server()
    monkeypatch.setattr("prefixtune.server.api.generation._MOST_LOGPROBS", 25_000)
    body = completion(model="tiny", prompt=[5] * 500, max_tokens=0, echo=True, logprobs=20)
    taken, refused = (asyncio.run(send(app, "POST", "/v1/completions", {**body, "n": n})) for n in (2, 3))
    assert (taken.status, refused.status, refused.code) == (200, 400, "too_many_logprobs")


def test_unknown_token_ids_are_refused(make_server):
    app, _ = make_server()
    for param, value in (
        *(("prompt", prompt) for prompt in ([10**9], [-1], [[5], [10**30]])),
        ("logit_bias", {"5": 1, "100000": 1}),
    ):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(**{param: value})))
        error = response.json["error"]
        assert (response.status, error["type"], error["param"]) == (400, "invalid_request_error", param)


@pytest.mark.parametrize(
    ("raw", "stop", "finish", "count"),
    [(False, ["<s>"], "stop", 0), (True, ["<s>"], "stop", 0), (True, ["<x>"], "length", 6)],
)
def test_a_special_token_may_be_a_stop_string(make_server, raw, stop, finish, count):
    app, state = make_server(raw_completions=raw)
    # Its text is never shown.
    bias = {str(state.backbone.tokenizer.bos_token_id): 100}
    body = completion(max_tokens=6, temperature=0, logit_bias=bias, stop=stop)
    reply = asyncio.run(send(app, "POST", "/v1/completions", body)).json
    assert (reply["choices"][0]["text"].strip(), reply["choices"][0]["finish_reason"]) == ("", finish)
    assert reply["usage"]["completion_tokens"] == count
