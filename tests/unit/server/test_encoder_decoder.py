"""The application over an encoder-decoder: completions and tasks as those of `generate`, and refused chats."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asgi_client import Response, send
from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import make_header
from prefixtune.data.encoding import default_format, encode_prompts
from prefixtune.engine.config import EngineConfig
from prefixtune.engine.engine import Engine
from prefixtune.engine.worker import EngineWorker
from prefixtune.inference.config import GenerateConfig
from prefixtune.inference.generate import generate
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.server.app import make_app
from prefixtune.server.prefixes import PrefixFolder
from prefixtune.server.settings import ServeConfig
from prefixtune.server.state import ServerState

SOURCE = "name : Aromi | area : city centre"


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_an_encoder_decoder_is_served(
    family: str, tiny_models: Any, enclosing_tokenizer: Any, random_prefix: Callable[..., Any], tmp_path: Path
) -> None:
    backbone = Backbone.from_model(tiny_models(family), enclosing_tokenizer, "tiny")
    prefixes: dict[str, Prefix | None] = {"tiny": None}
    for name, sites in {"all": {"encoder": 4, "decoder": 3, "cross": 5}, "one": {"encoder": 6}}.items():
        prefixes[name] = Prefix(random_prefix(backbone, sites, len(name)).layers, make_header(backbone, task="records"))
        save_prefix(tmp_path / f"{name}.safetensors", prefixes[name])
    engine = Engine(backbone, EngineConfig(num_slots=4))
    config = ServeConfig(backbone="tiny", prefixes=str(tmp_path))
    state = ServerState(config, backbone, PrefixFolder(tmp_path, backbone), EngineWorker(engine))
    app = make_app(state)

    async def send_all() -> list[Response]:
        short = {"max_tokens": 8, "temperature": 0}
        return list(
            await asyncio.gather(
                *(
                    send(app, "POST", "/v1/completions", {"model": name, "prompt": SOURCE, **short})
                    for name in prefixes
                ),
                *(send(app, "POST", f"/v1/tasks/{name}", {"source": SOURCE, **short}) for name in prefixes),
            )
        )

    try:
        responses = asyncio.run(send_all())
        assert [response.status for response in responses] == [200] * 6, [response.body for response in responses]
        text_format = default_format(backbone)
        (ids,) = encode_prompts(backbone, text_format, [SOURCE])
        assert ids[-1] == backbone.eos_id, "the encoder's own special tokens"
        for index, (name, prefix) in enumerate(prefixes.items()):
            (expected,) = generate(
                backbone, [SOURCE], prefix, text_format=text_format, config=GenerateConfig(max_new_tokens=8)
            )
            completion, task = responses[index].json, responses[index + 3].json
            assert completion["choices"][0]["text"].strip() == task["output"] == expected, name
            assert completion["usage"]["prompt_tokens"] == len(ids)
        chat = {"model": "all", "messages": [{"role": "user", "content": "hello"}]}
        refused = asyncio.run(send(app, "POST", "/v1/chat/completions", chat))
        assert (refused.status, refused.code) == (400, "no_chat_template")
        echo = {"model": "tiny", "prompt": SOURCE, "echo": True, "logprobs": 0}
        refused = asyncio.run(send(app, "POST", "/v1/completions", echo))
        assert (refused.status, refused.json["error"]["param"]) == (400, "echo")
        long = {"model": "all", "prompt": "word " * 3000, "max_tokens": 5} if family == "bart" else None
        if long:
            refused = asyncio.run(send(app, "POST", "/v1/completions", long))
            assert (refused.status, refused.code) == (400, "context_length_exceeded")
    finally:
        state.close()
