"""Prompts: the prefix's text format, long sources, and earlier messages."""

import asyncio
import logging

from asgi_client import completion, send
from prefixtune.backbone.prefixes import make_header
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix, save_prefix


def test_dropped_messages_are_reported(make_server, caplog):
    app, _ = make_server(earlier_messages="drop")
    chat_body = {"model": "a", "max_tokens": 6, "temperature": 0}
    last = {"role": "user", "content": "hello"}
    alone = asyncio.run(send(app, "POST", "/v1/chat/completions", {**chat_body, "messages": [last]}))
    assert "x-prefixtune-dropped-messages" not in alone.headers
    before = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "more"}]
    for stream in (False, True):
        with caplog.at_level(logging.DEBUG, "prefixtune.server"):
            body = {**chat_body, "messages": [*before, last], "stream": stream}
            response = asyncio.run(send(app, "POST", "/v1/chat/completions", body))
        assert response.headers["x-prefixtune-dropped-messages"] == "2"
        assert caplog.records[-1].__dict__["fields"]["dropped_messages"] == 2
        if not stream:
            assert response.json["choices"][0]["message"] == alone.json["choices"][0]["message"]


def test_long_sources_are_treated_as_in_training(make_server, backbone, text_format, random_prefix, caplog):
    app, state = make_server()
    cutting_format = {**text_format, "max_length": 60, "on_too_long": "cut", "longest_target": 20}
    header = make_header(backbone, task="records", text_format=cutting_format)
    prefix = Prefix(random_prefix(backbone, 4, 5).layers, header)
    save_prefix(state.store.folder / "cuts.safetensors", prefix)
    source = "abcdefghij" * 9
    cut = []
    (expected,) = generate(backbone, [source], prefix, max_new_tokens=12, on_cut=cut.append)
    assert cut == [[0]]
    shared = {"max_tokens": 12, "temperature": 0}
    body = {"model": "cuts", "prompt": source, **shared}
    with caplog.at_level(logging.DEBUG, "prefixtune.server"):
        response = asyncio.run(send(app, "POST", "/v1/completions", body))
    assert response.json["choices"][0]["text"] == expected
    # 93 tokens with the text format, of which 40 may stay.
    assert response.headers["x-prefixtune-cut-tokens"] == "53"
    assert caplog.records[-1].__dict__["fields"]["cut_tokens"] == 53
    assert response.json["usage"]["prompt_tokens"] == 40
    task = asyncio.run(send(app, "POST", "/v1/tasks/cuts", {"source": source, **shared}))
    assert (task.json["output"], task.headers["x-prefixtune-cut-tokens"]) == (expected, "53")
    # on_too_long of the server decides for all prefixes.
    strict, _ = make_server(on_too_long="error")
    refused = asyncio.run(send(strict, "POST", "/v1/completions", body))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")


def test_a_default_that_the_engine_lacks_is_left_out(make_server, backbone, text_format, random_prefix, monkeypatch):
    app, state = make_server()
    header = make_header(backbone, task="e2e", text_format=text_format)
    prefix = Prefix(random_prefix(backbone, 4, 5).layers, header)
    save_prefix(state.store.folder / "e2e.safetensors", prefix)
    submitted = []
    submit = state.worker.submit
    monkeypatch.setattr(state.worker, "submit", lambda one, *a, **k: (submitted.append(one), submit(one, *a, **k)))
    for lacks, least in (({}, 5), ({"min_new_tokens": 0, "presence_penalty": 0.0}, 0)):
        monkeypatch.setattr(state.worker, "lacks", lacks)
        asyncio.run(send(app, "POST", "/v1/completions", completion(model="e2e", prompt="a", max_tokens=12)))
        assert submitted[-1].sampling.min_new_tokens == least
    for more in ({"min_tokens": 2}, {"presence_penalty": 1.0}):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(model="e2e", prompt="a", **more)))
        assert (response.status, response.json["error"]["param"]) == (400, *more)
