"""A tiny model on disk, a folder with a prefix for it, and vLLM's application over both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_vllm import FakeVLLM, model_config, save, vllm_config
from prefixtune.backbone.load import load_backbone
from prefixtune.interop.vllm.chat_template import write_template
from prefixtune.interop.vllm.folder import PrefixFolder
from prefixtune.interop.vllm.settings import Settings

Make = Callable[..., Any]

TEXT_FORMAT = {"prompt": "Q: {source}{separator}", "target": " {target} ", "max_length": 60, "longest_target": 20}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory, tiny_models: Make, tiny_tokenizer: Any) -> Path:
    """A tiny LLaMA on disk."""
    folder = tmp_path_factory.mktemp("stored")
    tiny_models("llama").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(model_folder: Path, random_prefix: Make, tmp_path: Path) -> PrefixFolder:
    """A folder with one prefix, `pubs`, of 5 positions."""
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    save(backbone, random_prefix(backbone, 5), tmp_path / "pubs.safetensors")
    return PrefixFolder(Settings.from_vllm(vllm_config(tmp_path)), backbone.geometry, "tiny")


@pytest.fixture
def app(folder: PrefixFolder, tiny_tokenizer: Any, model_folder: Path) -> FakeVLLM:
    """vLLM's application over that folder."""
    shapes = load_backbone(model_folder, dtype="float32", device="cpu").geometry["decoder"]
    app = FakeVLLM(folder.settings.prefixes, tiny_tokenizer, model_folder)
    app.state.vllm_config.model_config = model_config(
        model=str(model_folder),
        get_head_size=lambda: shapes[0].key_dim,
        get_total_num_kv_heads=lambda: shapes[0].num_kv_heads,
        get_total_num_hidden_layers=lambda: len(shapes),
    )
    return app


@pytest.fixture
def format_app(
    app: FakeVLLM, folder: PrefixFolder, model_folder: Path, random_prefix: Make, rewrite_header: Make
) -> FakeVLLM:
    """vLLM's application with prefixes that store a text format: `qa`, and `framed` with words around its targets."""
    backbone = load_backbone(model_folder, dtype="float32", device="cpu")
    for name, changes in (
        ("qa", {"on_too_long": "cut"}),
        ("whole", {"on_too_long": "cut", "longest_prompt": 94}),
        ("wordy", {"on_too_long": "cut", "prompt": "w" * 39 + "{source}{separator}"}),
        ("framed", {"target": "<<{target}>>"}),
        ("hostile", {"prompt": "{source}" * 1500}),
    ):
        path = folder.settings.prefixes / f"{name}.safetensors"
        save(backbone, random_prefix(backbone, 5), path)
        rewrite_header(path, text_format={**TEXT_FORMAT, **changes})
    write_template(folder.settings.prefixes / "t.jinja", "{{ messages[0]['content'] }}")
    app.state.online_renderer.chat_template = (folder.settings.prefixes / "t.jinja").read_text()
    app.reply = {"model": "base", "choices": []}
    return app
