"""A real server, used by other programs as their users would: LangChain's clients, `llm` and ShellGPT."""

import os
import shutil
import subprocess
import sys

import langchain_openai
import openai
import pytest

from live_server import fill_folder, generate_alone, serve

PROMPT = "Two trains to Oldbridge"


@pytest.fixture(scope="module")
def backbone(folder):
    return fill_folder(folder, {"pubs": {"task": "e2e"}, "facts": {"task": "e2e"}})


@pytest.fixture(scope="module")
def server(folder, backbone):
    server = serve(folder, "--earlier-messages", "drop")
    yield server
    assert server.stop() == 0


def test_langchain_completes_and_chats_whole_and_in_pieces(backbone, folder, server, monkeypatch):
    monkeypatch.setenv("LANGSMITH_TRACING", "false")
    options = {
        "base_url": f"{server.url}/v1",
        "api_key": "unused",
        "max_retries": 0,
        "temperature": 0,
        "max_tokens": 20,
    }
    model = langchain_openai.OpenAI(model="pubs", **options)
    wanted = generate_alone(backbone, folder / "prefixes", backbone.encode(PROMPT), "pubs", max_new_tokens=20)
    assert model.invoke(PROMPT) == wanted
    pieces = list(model.stream(PROMPT))
    assert len(pieces) > 10
    assert "".join(pieces) == wanted
    assert model.batch([PROMPT, "x"])[0] == wanted

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


@pytest.mark.parametrize("stream", [True, False])
def test_llm_chats(backbone, folder, server, tmp_path, stream):
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: facts\n  model_name: facts\n  api_base: {server.url}/v1\n  api_key_name: local\n"
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path), "LLM_LOCAL_KEY": "unused"}
    command = [sys.executable, "-m", "llm", "-m", "facts", "-o", "temperature", "0", "-o", "max_tokens", "20"]
    command += ["--key", "unused", *([] if stream else ["--no-stream"]), PROMPT]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    ids = backbone.encode(f"[user]{PROMPT}</s>[assistant]")
    expected = generate_alone(backbone, folder / "prefixes", ids, "facts", max_new_tokens=20)
    assert result.stdout.removesuffix("\n") == expected


def test_shell_gpt_chats(server, tmp_path):
    program = os.environ.get("PREFIXTUNE_SGPT") or shutil.which("sgpt")
    if not program:
        pytest.skip("shell-gpt is not installed: `make test-integrations` puts it into an environment of its own")
    environment = {
        **os.environ,
        "HOME": str(tmp_path),
        "API_BASE_URL": f"{server.url}/v1",
        "OPENAI_API_KEY": "unused",
        "DEFAULT_MODEL": "facts",
        "OPENAI_USE_FUNCTIONS": "false",
        "SHOW_FUNCTIONS_OUTPUT": "false",
        "PRETTIFY_MARKDOWN": "false",
        "DISABLE_STREAMING": "false",
    }
    command = [program, "--no-cache", "--temperature", "0", "--no-md", PROMPT]
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL
    )
    assert result.returncode == 0, result.stderr
    line = [line for line in server.lines if line.get("path") == "/v1/chat/completions"][-1]
    assert line["status"] == 200
    assert result.stdout.strip()
