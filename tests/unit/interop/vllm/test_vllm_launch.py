"""The command line that starts vLLM, and what it needs to import."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from command_line import run
from prefixtune.interop.vllm.chat_template import PLACEHOLDERS_VARIABLE, PROMPT_VARIABLE, write_template
from prefixtune.server.settings import ServeConfig


def render(template: str, **variables: Any) -> str:
    """A chat with one message, as transformers renders it."""
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(messages=["a"], **variables)


@pytest.mark.parametrize(
    "before", ["", "\n", "  ", "  {% if true %}if{% endif %}", "{# x #}\n", "{%- if 1 %}\n{% endif %}"]
)
@pytest.mark.parametrize("after", ["", "\n", "\n\n", "\r\n", "\n  ", "\n{{ 'A:' }}\n", "  {% if false %}{% endif %}\n"])
def test_a_models_own_template_writes_what_it_did(before: str, after: str, tmp_path: Path):
    own = f"{before}{{{{ messages[0] }}}}{after}"
    write_template(tmp_path / "t.jinja", own)
    with open(tmp_path / "t.jinja", newline="") as file:
        template = file.read()
    assert render(template) == render(own)
    assert render(template, **{PLACEHOLDERS_VARIABLE: "##"}) == "##" + render(own)
    assert render(template, **{PLACEHOLDERS_VARIABLE: "##", PROMPT_VARIABLE: "b"}) == "##b"


@pytest.mark.parametrize(
    ("stored", "chat", "with_tools"),
    [
        ("own {{ messages[0] }}\n", "own a", "own a"),
        ([{"name": "default", "template": "own {{ messages[0] }}\n"}], "own a", "own a"),
        (
            [{"name": "default", "template": "  own\n"}, {"name": "tool_use", "template": "tools\n\n"}],
            "  own",
            "tools\n",
        ),
    ],
)
def test_the_template_of_a_tokenizer(stored: Any, chat: str, with_tools: str, tmp_path: Path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": stored}))
    shown = serve("--backbone", str(tmp_path), "--prefixes", str(tmp_path), "--show-command", code=0)
    command = shlex.split(shown.splitlines()[0])
    template = Path(command[command.index("--chat-template") + 1]).read_text()
    assert render(template) == chat
    assert render(template, tools=[{}]) == with_tools


@pytest.mark.parametrize(
    "files", [{}, {"tokenizer_config.json": "{"}, {"tokenizer_config.json": '{"chat_template": [{"name": "rag"}]}'}]
)
def test_a_template_that_cannot_be_read_is_left_to_vllm(files: dict[str, str], tmp_path: Path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    shown = serve("--backbone", str(tmp_path), "--prefixes", str(tmp_path), "--show-command", code=0)
    assert "--chat-template" not in shown


def serve(*arguments: str, code: int = 2) -> str:
    """What is printed, or why it is refused, by exit code."""
    return run("serve", "--engine", "vllm", *arguments, code=code)[1 if code else 0]


def test_the_command_is_shown_and_refused(model_folder: Path, tmp_path: Path):
    files = ("--backbone", str(model_folder), "--prefixes", str(tmp_path))
    shown = serve(*files, "--show-command", "--vllm-args=--enforce-eager", code=0)
    assert f"--model {model_folder}" in shown
    vllm, training = map(shlex.split, shown.splitlines())
    assert vllm[-1] == "--enforce-eager"
    # Both name the same socket, and each gets what it uses.
    socket = json.loads(vllm[vllm.index("--kv-transfer-config") + 1])["kv_connector_extra_config"]["training_socket"]
    beside = ServeConfig(engine="none", host=f"unix:{socket}", backbone=str(model_folder), prefixes=str(tmp_path))
    options = dict(zip(training[4::2], training[5::2], strict=True))
    assert {option: options[option] for option in ("--engine", "--host", "--backbone", "--prefixes")} == {
        f"--{name}": getattr(beside, name) for name in ("engine", "host", "backbone", "prefixes")
    }
    assert options["--device"] == "cpu"
    alone = serve(*files, "--show-command", "--train-workers", "0", code=0)
    assert "training" not in alone
    chosen = serve(*files, "--show-command", "--device", "cuda:1", "--no-playground", "--data-folder", "d", code=0)
    assert chosen.endswith("--device cuda:1 --no-playground --data-folder d --backbone-id " + model_folder.name + "\n")
    limited = shlex.split(serve(*files, "--show-command", "--max-joined-prefixes", "3", code=0))
    transfer = json.loads(limited[limited.index("--kv-transfer-config") + 1])
    assert transfer["kv_connector_extra_config"]["max_joined_prefixes"] == 3
    refused = serve(*files, "--quantize", "int8", "--device", "cpu", "--train-workers", "0")
    assert "quantize" in refused
    assert "device" in refused
    serve(*files)
    assert "VLLM_API_KEY" in serve(*files, "--host", "0.0.0.0")
    serve(*files, '--vllm-args="')
    assert "--host" in serve(*files, "--vllm-args=--host=0.0.0.0")
    serve("--backbone", str(model_folder), "--prefixes", str(tmp_path / "none"))


def test_the_plugin_needs_none_of_the_libraries_that_vllm_pins():
    code = (
        "import sys; import prefixtune.interop.vllm.settings, prefixtune.interop.vllm.middleware;"
        "import prefixtune.interop.vllm.launch;"
        "loaded = {name.partition('.')[0] for name in sys.modules};"
        "print(sorted(loaded & {'transformers', 'peft', 'starlette', 'gguf'}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout == "[]\n"
