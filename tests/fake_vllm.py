"""vLLM's configuration and application, as far as the plugin uses them."""

from __future__ import annotations

import asyncio
import enum
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from prefixtune.backbone.prefixes import make_header
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE
from prefixtune.interop.vllm.middleware import PrefixMiddleware
from prefixtune.prefix.prefix import Prefix, save_prefix


def vllm_config(folder: Path, policy: str = "fail", **extra: Any) -> Any:
    """vLLM's VllmConfig, as far as settings are read from it."""
    options = {"prefixes": str(folder), **extra}
    transfer = SimpleNamespace(kv_connector_extra_config=options, engine_id="drawn", kv_load_failure_policy=policy)
    return SimpleNamespace(kv_transfer_config=transfer, parallel_config=SimpleNamespace(data_parallel_size=1))


def model_config(**changes: Any) -> Any:
    """vLLM's ModelConfig of a tiny LLaMA."""
    facts = {
        "model": "tiny",
        **dict.fromkeys(("is_encoder_decoder", "use_mla", "is_hybrid", "is_attention_free"), False),
        "is_multimodal_model": False,
        "get_head_size": lambda: 8,
        "get_total_num_kv_heads": lambda: 2,
        "get_total_num_hidden_layers": lambda: 3,
        "hf_text_config": SimpleNamespace(tie_word_embeddings=False),
    }
    return SimpleNamespace(**{**facts, **changes})


class ConnectorBase:
    """vLLM's base class of connectors, as far as the plugin uses it."""

    def __init__(self, config: Any, role: Any, kv_cache_config: Any) -> None:
        self._vllm_config = config

    def bind_kv_cache_manager(self, manager: Any) -> None:
        """What versions that are too old do not have."""


def import_connector(patch: pytest.MonkeyPatch, base: type = ConnectorBase, version: str = "0.32.0") -> Any:
    """The plugin's connector, as a vLLM with that base class imports it."""
    connector = "prefixtune.interop.vllm.connector"
    names = {
        "vllm": {"__version__": version},
        "vllm.logger": {"init_logger": lambda name: None},
        "vllm.distributed.kv_transfer.kv_connector.v1.base": {
            "KVConnectorBase_V1": base,
            "KVConnectorMetadata": type("KVConnectorMetadata", (), {}),
            "KVConnectorRole": enum.Enum("KVConnectorRole", "SCHEDULER WORKER"),
        },
    }
    for name, contents in names.items():
        module = ModuleType(name)
        module.__dict__.update(contents)
        patch.setitem(sys.modules, name, module)
    patch.delitem(sys.modules, connector, raising=False)
    try:
        return importlib.import_module(connector)
    finally:
        # The next test imports it anew.
        sys.modules.pop(connector, None)


def save(backbone: Any, prefix: Prefix, path: Path, **header: Any) -> None:
    """Store a prefix with the header of a backbone, and some fields of its own; None: without the field."""
    fields = {**make_header(backbone, task="e2e"), **header}
    kept = {name: value for name, value in fields.items() if value is not None}
    save_prefix(path, Prefix(prefix.layers, kept, prefix.head))


class FakeVLLM:
    """vLLM's application: records requests, and answers with `reply`, or with the stream of `pieces`."""

    def __init__(self, folder: Path, tokenizer: Any, model_folder: Path) -> None:
        config = vllm_config(folder)
        config.model_config = model_config(model=str(model_folder))
        self.state = SimpleNamespace(
            vllm_config=config,
            args=SimpleNamespace(served_model_name=["base"], model=str(model_folder), api_key=None),
            engine_client=SimpleNamespace(get_tokenizer=lambda: tokenizer),
            online_renderer=SimpleNamespace(chat_template="{{ " + PLACEHOLDERS_VARIABLE + " }}"),
        )
        self.bodies: list[Any] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.reply: Any = {}
        self.pieces: list[bytes] = []
        self.status = 200

    @property
    def options(self) -> dict[str, Any]:
        """The connector's options."""
        options: dict[str, Any] = self.state.vllm_config.kv_transfer_config.kv_connector_extra_config
        return options

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while scope["method"] == "POST":
            message = await receive()
            body += message["body"]
            if not message["more_body"]:
                break
        if scope["method"] == "POST":
            self.headers.append(dict(scope["headers"]))
            try:
                self.bodies.append(json.loads(body))
            except ValueError:
                self.bodies.append(body)
        content_type = b"text/event-stream; charset=utf-8" if self.pieces else b"application/json"
        whole = json.dumps(self.reply).encode()
        headers = [(b"content-type", content_type)] + ([] if self.pieces else [(b"content-length", b"%d" % len(whole))])
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        pieces = self.pieces or [whole[:3], whole[3:]]
        for index, piece in enumerate(pieces):
            await send({"type": "http.response.body", "body": piece, "more_body": index < len(pieces) - 1})

    def encode(self, text: str) -> list[int]:
        """A text's token ids."""
        ids: list[int] = self.state.engine_client.get_tokenizer()(text, add_special_tokens=False)["input_ids"]
        return ids


@dataclass
class Response:
    """What a client gets."""

    status: int
    headers: dict[bytes, bytes]
    body: bytes


def request(app: FakeVLLM, path: str, body: Any = None, method: str = "POST") -> Response:
    """Send a request through the middleware, its body in two parts."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    halves = [(data[:5], True), (data[5:], False)]
    sent: list[Any] = []

    async def receive() -> Any:
        part, more = halves.pop(0)
        return {"type": "http.request", "body": part, "more_body": more}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": method, "path": path, "root_path": "", "app": SimpleNamespace(state=app.state)}
    scope["headers"] = [(b"content-length", str(len(data)).encode()), (b"authorization", b"Bearer x")]
    asyncio.run(PrefixMiddleware(app)(scope, receive, send))
    starts = [message for message in sent if message["type"] == "http.response.start"]
    assert len(starts) == 1
    text = b"".join(message.get("body", b"") for message in sent[1:])
    headers = dict(starts[0]["headers"])
    if b"content-length" in headers:
        assert int(headers[b"content-length"]) == len(text)
    return Response(starts[0]["status"], headers, text)


def call(app: FakeVLLM, path: str, body: Any = None, method: str = "POST") -> tuple[int, Any]:
    """The status of a response, and its value, or the raw stream."""
    response = request(app, path, body, method)
    return response.status, response.body if app.pieces else json.loads(response.body)
