"""Prompts: the prefix's text format, long sources, earlier messages; whole conversations by a chat template."""

import asyncio
import logging

import pytest

from asgi_client import completion, send
from chat_templates import TEMPLATE
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.chat import chat_format, encode_chat
from prefixtune.inference.generate import generate
from prefixtune.prefix.chat_format import allow_template


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


def test_long_sources_are_treated_as_in_training(make_server, backbone, text_format, save_random_prefix, caplog):
    app, state = make_server()
    cutting = {**text_format, "max_length": 60, "on_too_long": "cut", "longest_target": 20}
    facts = {"task": "records", "text_format": cutting}
    prefix = load_prefix(save_random_prefix(state.store.folder / "cuts.safetensors", backbone, **facts))
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
    # A default that nobody asked for takes no room from a source that training left whole.
    facts["text_format"] = {**cutting, "max_length": 0, "longest_prompt": 93, "longest_target": 110}
    save_random_prefix(state.store.folder / "whole.safetensors", backbone, **facts)
    whole = asyncio.run(send(app, "POST", "/v1/completions", {"model": "whole", "prompt": source, "min_tokens": 1}))
    assert "x-prefixtune-cut-tokens" not in whole.headers
    assert whole.json["usage"]["prompt_tokens"] == 93
    # Records may be answered as long as in training.
    assert asyncio.run(send(app, "GET", "/v1/tasks/whole")).json["max_tokens"] == 110
    # on_too_long of the server decides for all prefixes.
    strict, _ = make_server(on_too_long="error")
    refused = asyncio.run(send(strict, "POST", "/v1/completions", body))
    assert (refused.status, refused.code) == (400, "context_length_exceeded")


def test_a_default_that_the_engine_lacks_is_left_out(
    make_server, backbone, text_format, save_random_prefix, monkeypatch
):
    app, state = make_server()
    save_random_prefix(state.store.folder / "e2e.safetensors", backbone, task="e2e", text_format=text_format)
    submitted = prompts_of(state, monkeypatch)
    for lacks, least in (((), 5), (("min_new_tokens", "presence_penalty"), 0)):
        monkeypatch.setattr(state.worker, "lacks", lacks)
        asyncio.run(send(app, "POST", "/v1/completions", completion(model="e2e", prompt="a", max_tokens=12)))
        assert submitted[-1].sampling.min_new_tokens == least
    for more in ({"min_tokens": 2}, {"presence_penalty": 1.0}):
        response = asyncio.run(send(app, "POST", "/v1/completions", completion(model="e2e", prompt="a", **more)))
        assert (response.status, response.json["error"]["param"]) == (400, *more)


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
]


REFUSES = "{{ raise_exception('only one turn') }}"
HANGS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def server(make_server, backbone, save_random_prefix, tmp_path):
    """An application with the prefix `chatty`, and others whose templates do not write the messages."""
    (tmp_path / "prefixes").mkdir()
    allow_template(REFUSES)
    form = chat_format(backbone, TEMPLATE).to_dict()
    for name, template in (("chatty", TEMPLATE), ("refuses", REFUSES), ("hangs", HANGS)):
        facts = {"task": "records", "text_format": {**form, "chat_template": template}}
        save_random_prefix(tmp_path / "prefixes" / f"{name}.safetensors", backbone, seed=9, **facts)
    return make_server()


def prompts_of(state, monkeypatch):
    """The requests that the engine gets from now on."""
    requests = []
    submit = state.worker.submit

    def record(request, *args, **options):
        requests.append(request)
        return submit(request, *args, **options)

    monkeypatch.setattr(state.worker, "submit", record)
    return requests


def test_all_messages_are_read(server, backbone, tmp_path, monkeypatch):
    app, state = server
    requests, form = prompts_of(state, monkeypatch), chat_format(backbone, TEMPLATE)
    body = {"model": "chatty", "messages": CHAT, "max_tokens": 6, "temperature": 0}
    response = asyncio.run(send(app, "POST", "/v1/chat/completions", body))
    assert response.status == 200
    assert "x-prefixtune-dropped-messages" not in response.headers
    assert list(requests[-1].prompt) == encode_chat(backbone, CHAT, form)
    assert requests[-1].sampling.end_ids == (backbone.tokenizer.pad_token_id,)
    prefix = load_prefix(tmp_path / "prefixes" / "chatty.safetensors", backbone)
    (expected,) = generate(backbone, [CHAT], prefix, max_new_tokens=6)
    assert response.json["choices"][0]["message"]["content"] == expected
    # The newer name of a role, as in the backbone's own template; a completion and a task are one user message.
    body["messages"] = [{"role": "developer", "content": "S"}, *CHAT[1:]]
    asyncio.run(send(app, "POST", "/v1/chat/completions", body))
    assert list(requests[-1].prompt) == encode_chat(backbone, CHAT, form)
    for path, body in (
        ("/v1/completions", {"model": "chatty", "prompt": "Hi", "max_tokens": 3}),
        ("/v1/tasks/chatty", {"source": "Hi", "max_tokens": 3}),
    ):
        assert asyncio.run(send(app, "POST", path, body)).status == 200
        assert list(requests[-1].prompt) == encode_chat(backbone, [CHAT[1]], form)


def test_a_template_that_refuses_and_one_that_nobody_named(server):
    app, state = server
    body = {"messages": CHAT}
    assert asyncio.run(send(app, "POST", "/v1/chat/completions", {"model": "refuses", **body})).status == 400
    assert asyncio.run(send(app, "POST", "/v1/chat/completions", {"model": "hangs", **body})).status == 503
    assert list(state.store.refused) == ["hangs"]
