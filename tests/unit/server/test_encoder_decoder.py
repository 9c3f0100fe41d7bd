"""The application over an encoder-decoder: completions and tasks as those of `generate`, and refused chats."""

import asyncio

import pytest

from asgi_client import send
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data.encoding import default_format, encode_prompts
from prefixtune.inference.generate import generate

SOURCE = "name : Aromi | area : city centre"


@pytest.fixture(params=["bart", "t5"])
def backbone(request, tiny_models, enclosing_tokenizer):
    """In the place of the decoder that other tests' servers have."""
    return Backbone.from_model(tiny_models(request.param), enclosing_tokenizer, "tiny")


def test_an_encoder_decoder_is_served(make_server, backbone):
    app, state = make_server()
    (ids,) = encode_prompts(backbone, default_format(backbone), [SOURCE])
    assert ids[-1] == backbone.eos_id, "the encoder's own special tokens"
    short = {"max_tokens": 8, "temperature": 0}

    def post(path, **body):
        return asyncio.run(send(app, "POST", path, {**short, **body}))

    for name in ("tiny", "a"):
        prefix = None if name == "tiny" else load_prefix(state.store.folder / "a.safetensors", backbone)
        form = default_format(backbone) if prefix is None else None
        (expected,) = generate(backbone, [SOURCE], prefix, text_format=form, max_new_tokens=8)
        completion = post("/v1/completions", model=name, prompt=SOURCE).json
        task = post(f"/v1/tasks/{name}", source=SOURCE).json
        assert completion["choices"][0]["text"].strip() == task["output"] == expected, name
    refused = post("/v1/chat/completions", model="tiny", messages=[{"role": "user", "content": "hello"}])
    assert (refused.status, refused.code) == (400, "no_chat_template")
    refused = post("/v1/completions", model="tiny", prompt=SOURCE, echo=True, logprobs=0)
    assert (refused.status, refused.json["error"]["param"]) == (400, "echo")
