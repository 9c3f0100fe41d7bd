"""With a prefix that was trained with a chat template, vLLM's model reads what ours does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from jinja2 import Template

from fake_vllm import FakeVLLM, call, request
from prefixtune.backbone.load import load_backbone
from prefixtune.data.chat import chat_format, encode_chat

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


@pytest.fixture
def backbone(model_folder: Path) -> Any:
    return load_backbone(model_folder, dtype="float32", device="cpu")


@pytest.fixture
def chat_app(format_app: FakeVLLM, backbone: Any, folder: Any, rewrite_header: Any) -> FakeVLLM:
    form = {**chat_format(backbone, TEMPLATE).to_dict(), "on_too_long": "cut", "max_length": 60, "longest_target": 10}
    rewrite_header(folder.settings.prefixes / "qa.safetensors", text_format=form)
    return format_app


def test_the_whole_conversation_is_read(chat_app: FakeVLLM, backbone: Any) -> None:
    form = chat_format(backbone, TEMPLATE)
    response = request(chat_app, "/v1/chat/completions", {"model": "qa", "messages": CHAT, "stop_token_ids": [7]})
    assert response.status == 200
    assert b"x-prefixtune-dropped-messages" not in response.headers
    body = chat_app.bodies[-1]
    text = Template(chat_app.state.online_renderer.chat_template).render(
        messages=[{"content": "no"}], **body["chat_template_kwargs"]
    )
    assert chat_app.encode(text)[5:] == encode_chat(backbone, CHAT, form)
    assert body["stop_token_ids"] == [7, backbone.tokenizer.pad_token_id]
    call(chat_app, "/v1/completions", {"model": "qa", "prompt": "Hi"})
    assert chat_app.bodies[-1]["prompt"][5:] == encode_chat(backbone, [CHAT[1]], form)


def test_a_long_prompt_is_cut_inside_the_template(chat_app: FakeVLLM, backbone: Any) -> None:
    response = request(chat_app, "/v1/completions", {"model": "qa", "prompt": "long " * 20, "max_tokens": 10})
    ids = chat_app.bodies[-1]["prompt"][5:]
    assert len(ids) == 50
    assert backbone.tokenizer.decode(ids).endswith("<pad>\n<s>a:")
    assert int(response.headers[b"x-prefixtune-cut-tokens"]) > 0


@pytest.mark.parametrize(
    ("message", "says"),
    [({"role": "tool", "content": "x"}, "role must be one of"), ({"role": "user", "content": " "}, "not empty")],
)
def test_messages_that_no_template_reads(chat_app: FakeVLLM, message: Any, says: str) -> None:
    status, response = call(chat_app, "/v1/chat/completions", {"model": "qa", "messages": [message, *CHAT]})
    assert status == 400
    assert says in response["error"]["message"]
