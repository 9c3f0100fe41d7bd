"""A prefix that was trained with a chat template reads whole conversations, as in training."""

import asyncio

import pytest

from asgi_client import send
from prefixtune.backbone.prefixes import load_prefix, make_header
from prefixtune.data.chat import chat_format, encode_chat
from prefixtune.inference.generate import generate
from prefixtune.prefix.chat_format import allow_template
from prefixtune.prefix.prefix import Prefix, save_prefix

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role[0] }}:{{ m.content }}<pad>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>a:{% endif %}"
)
CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Go on"},
]


REFUSES = "{{ raise_exception('only one turn') }}"
HANGS = "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def server(make_server, backbone, random_prefix, tmp_path):
    """An application with the prefix `chatty`, and others whose templates do not write the messages."""
    (tmp_path / "prefixes").mkdir()
    allow_template(REFUSES)
    form = chat_format(backbone, TEMPLATE).to_dict()
    for name, template in (("chatty", TEMPLATE), ("refuses", REFUSES), ("hangs", HANGS)):
        header = make_header(backbone, task="records", text_format={**form, "chat_template": template})
        prefix = Prefix(random_prefix(backbone, 4, 9).layers, header)
        save_prefix(tmp_path / "prefixes" / f"{name}.safetensors", prefix)
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
