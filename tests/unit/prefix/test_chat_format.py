"""Chat templates: one from elsewhere is not even compiled before somebody has named it."""

import json
import subprocess
import sys

import jinja2
import pytest

from prefixtune.backbone.prefixes import PrefixValidator, make_header
from prefixtune.cli.main import main
from prefixtune.errors import CheckpointError, ConfigError, RequestError
from prefixtune.inference.model import load
from prefixtune.prefix.chat_format import allow_named, allow_template, is_allowed, render_chat
from prefixtune.prefix.prefix import Prefix, read_outline, save_prefix
from prefixtune.prefix.text_format import TextFormat

TALK = [{"role": "user", "content": "Hi"}]


@pytest.fixture(autouse=True)
def of_nobody(monkeypatch, tmp_path):
    """Nothing is named yet, in this process or before."""
    monkeypatch.setattr("prefixtune.prefix.chat_format._allowed", {"", "model"})
    monkeypatch.setenv("PREFIXTUNE_HOME", str(tmp_path / "home"))


@pytest.fixture
def stored(llama, random_prefix, tmp_path):
    """Store a prefix with a chat template of its own."""

    def store(template):
        form = TextFormat("{source}", "{target}", end="</s>", chat_template=template).to_dict()
        header = make_header(llama, text_format=form)
        return save_prefix(tmp_path / "p.safetensors", Prefix(random_prefix(llama, 3).detach().layers, header))

    return store


def test_reading_a_file_compiles_nothing(stored, llama, monkeypatch, capsys):
    # Jinja computes constants when it compiles: this one would take gigabytes.
    path = stored("{{ 'a'" + "|tojson" * 26 + " }}")

    def compiled(*_, **__):
        raise AssertionError("a template was compiled")

    monkeypatch.setattr(jinja2.Environment, "compile", compiled)
    read_outline(path)
    assert main(["inspect", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["header"]["text_format"]["chat_template"].startswith("{{ 'a'")
    with pytest.raises(CheckpointError):
        PrefixValidator(llama, 10**9).read_header(path)
    with pytest.raises(RequestError):
        load(llama, path).generate([TALK])


def test_a_template_of_a_file_runs_once_it_was_named(stored, llama, tmp_path):
    template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    path, file = stored(template), tmp_path / "mine.jinja"
    with pytest.raises(RequestError) as refused:
        load(llama, path).chat(TALK)
    assert "--chat-template own" in refused.value.hint
    file.write_text("{{ messages }}")
    load(llama, path, chat_template=file)
    assert not is_allowed(template)
    model = load(llama, path, chat_template="own")
    assert is_allowed(template)
    assert model.chat(TALK, max_new_tokens=2) is not None
    PrefixValidator(llama, 10**9).read_header(path)


@pytest.mark.parametrize("remember", [False, True])
def test_what_was_named_is_remembered_for_the_user_alone(remember, tmp_path):
    file = tmp_path / "mine.jinja"
    file.write_text("{{ messages[0].content }}\n", encoding="utf-8")
    allow_named(str(file), (), remember=remember)
    assert is_allowed(file.read_text(encoding="utf-8"))
    code = f"from prefixtune.prefix.chat_format import is_allowed; print(is_allowed({file.read_text()!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{remember}\n", done.stderr


def test_a_file_of_templates_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jinja").write_bytes(b"\xff\xfe\xff")
    for name in (*(str(tmp_path / one) for one in ("bad.jinja", "none.jinja", "a\0b", ".")), "own"):
        with pytest.raises(ConfigError):
            allow_named(name, ())


@pytest.mark.parametrize("template", ["{% for m in messages %}", "{{ 1 / 0 }}"])
def test_a_template_that_fails(template, llama):
    allow_template(template)
    with pytest.raises(RequestError):
        render_chat(llama.tokenizer, TextFormat(chat_template=template), TALK, add_generation_prompt=True)
