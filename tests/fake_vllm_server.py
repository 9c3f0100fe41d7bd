"""vLLM's server as a process, as far as the plugin sees it: the middleware around an application that asks for a key.

`write_vllm` makes a package `vllm` whose `vllm.entrypoints.openai.api_server` runs it.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_MODULE = "from fake_vllm_server import main\n\nmain()\n"


def write_vllm(folder: Path) -> Path:
    """Make the package in a folder for PYTHONPATH."""
    package = folder / "vllm" / "entrypoints" / "openai"
    package.mkdir(parents=True)
    (package / "api_server.py").write_text(_MODULE)
    return folder


def main() -> None:
    """Serve until a signal comes."""
    import uvicorn
    from transformers import AutoTokenizer

    from fake_vllm import FakeVLLM, model_config
    from prefixtune.backbone.load import load_backbone
    from prefixtune.interop.vllm.middleware import PrefixMiddleware

    parser = argparse.ArgumentParser()
    for option in ("model", "served-model-name", "host", "port", "kv-transfer-config"):
        parser.add_argument(f"--{option}")
    options, _ = parser.parse_known_args()
    settings = json.loads(options.kv_transfer_config)["kv_connector_extra_config"]
    vllm = FakeVLLM(Path(settings["prefixes"]), AutoTokenizer.from_pretrained(options.model), Path(options.model))
    vllm.options.update(settings)
    shapes = load_backbone(options.model, device="cpu").geometry["decoder"]
    vllm.state.vllm_config.model_config = model_config(
        model=options.model,
        get_head_size=lambda: shapes[0].key_dim,
        get_total_num_kv_heads=lambda: shapes[0].num_kv_heads,
        get_total_num_hidden_layers=lambda: len(shapes),
    )
    vllm.state.args.served_model_name = [options.served_model_name]
    app = SimpleNamespace(state=vllm.state)
    middleware = PrefixMiddleware(_with_key(vllm))

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await middleware({**scope, "app": app}, receive, send)

    uvicorn.run(serve, host=options.host, port=int(options.port), lifespan="off", log_level="warning")


def _with_key(vllm: Any) -> Any:
    """vLLM's application behind its check of the key, which comes after the middleware."""
    key = os.environ.get("VLLM_API_KEY")

    async def checked(scope: Any, receive: Any, send: Any) -> None:
        allowed = not key or (b"authorization", f"Bearer {key}".encode()) in scope["headers"]
        is_list = scope["path"] == "/v1/models"
        vllm.status = 401 if not allowed else 200 if is_list or scope["method"] == "POST" else 404
        vllm.reply = {"object": "list", "data": []} if is_list else {"error": {"message": "fake"}}
        if allowed and scope["method"] == "POST":
            vllm.reply = {"id": "1", "object": "text_completion", "created": 1, "model": "base", "choices": []}
        await vllm(scope, receive, send)

    return checked
