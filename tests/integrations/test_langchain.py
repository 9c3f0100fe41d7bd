"""A real server, called by LangChain's clients."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import langchain_openai
import openai
import pytest

from live_server import MODEL, LiveServer, generate_alone, make_model, make_prefix
from prefixtune.backbone.load import load_backbone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("langchain")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    return folder


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Any:
    return load_backbone(folder / MODEL, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(folder: Path, backbone: Any) -> Iterator[LiveServer]:
    for seed, name in enumerate(("pubs", "facts")):
        make_prefix(backbone, folder / "prefixes" / f"{name}.safetensors", seed, task="e2e")
    server = LiveServer(folder / MODEL, folder / "prefixes").wait()
    yield server
    server.stop()


def test_langchain_completes_and_chats_whole_and_in_pieces(
    backbone: Any, folder: Path, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    options: dict[str, Any] = {
        "base_url": f"{server.url}/v1",
        "api_key": "unused",
        "max_retries": 0,
        "temperature": 0,
        "max_tokens": 20,
    }
    prompt = "Two trains to Oldbridge"
    model = langchain_openai.OpenAI(model="pubs", **options)
    wanted = generate_alone(backbone, folder / "prefixes", backbone.encode(prompt), "pubs", max_new_tokens=20)
    assert model.invoke(prompt) == wanted
    pieces = list(model.stream(prompt))
    assert len(pieces) > 10
    assert "".join(pieces) == wanted
    assert model.batch([prompt, "x"])[0] == wanted

    talker = langchain_openai.ChatOpenAI(model="facts", stream_usage=True, **options)
    messages = [("system", "be kind"), ("human", "Hello!")]
    ids = backbone.encode("[system]be kind</s>[user]Hello!</s>[assistant]")
    said = generate_alone(backbone, folder / "prefixes", ids, "facts", max_new_tokens=20)
    answer = talker.invoke(messages)
    assert answer.content == said
    assert answer.usage_metadata["output_tokens"] == 20
    assert answer.response_metadata["finish_reason"] == "length"
    chunks = list(talker.stream(messages))
    assert len(chunks) > 10
    assert "".join(chunk.content for chunk in chunks) == said
    assert [chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata] == [20]
    with pytest.raises(openai.BadRequestError, match="tools"):
        talker.bind(tools=[{"type": "function", "function": {"name": "f"}}]).invoke(messages)
