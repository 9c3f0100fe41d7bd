"""A real server, used by `llm` and by ShellGPT as their users would: from a shell, streamed."""

import os
import shutil
import subprocess
import sys

import pytest

from live_server import MODEL, LiveServer, generate_alone, make_model, make_prefix
from prefixtune.backbone.load import load_backbone

PROMPT = "Two trains to Oldbridge"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shells")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    return folder


@pytest.fixture(scope="module")
def backbone(folder):
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    make_prefix(backbone, folder / "prefixes" / "facts.safetensors", 1, task="e2e")
    return backbone


@pytest.fixture(scope="module")
def server(folder, backbone):
    server = LiveServer(folder / MODEL, folder / "prefixes", "--earlier-messages", "drop").wait()
    yield server
    assert server.stop() == 0


def said(backbone, folder, chat, **sampling):
    return generate_alone(backbone, folder / "prefixes", backbone.encode(chat), "facts", **sampling)


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
    expected = said(backbone, folder, f"[user]{PROMPT}</s>[assistant]", max_new_tokens=20)
    assert result.stdout.removesuffix("\n") == expected


def test_shell_gpt_chats(backbone, folder, server, tmp_path):
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
