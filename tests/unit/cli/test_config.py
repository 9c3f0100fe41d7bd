"""`prefixtune config`: JSON schemas that editors complete configuration files by."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from command_line import call, run
from prefixtune.errors import ConfigError
from prefixtune.server.auth import hash_key

NAMES = ("train", "distill", "generate", "classify", "serve", "worker", "engine")
SERVE = f"""
#:schema serve.schema.json
host = "0.0.0.0"
port = 80
dtype = "float32"
cors_origins = ["https://a.example"]
deadline = 1e2

[keys.alice]
hash = "{hash_key("pt-alice")}"
prefixes = ["a-*"]
"""


def schema_of(name: str) -> Any:
    return json.loads(run("config", "schema", name)[0])


def faults(name: str, text: str) -> list[str]:
    validator = jsonschema.Draft202012Validator(schema_of(name))
    return [error.json_path for error in validator.iter_errors(tomllib.loads(text))]


@pytest.mark.parametrize("name", NAMES)
def test_a_schema_says_what_an_editor_shows(name: str) -> None:
    schema = schema_of(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["title"].endswith("Config")
    assert schema["additionalProperties"] is False
    for key, field in schema["properties"].items():
        assert field["description"], key
        assert "default" in field, key
        assert not field.keys() & {"group", "flag", "positional", "show_default"}, key


def test_a_schema_accepts_a_correct_file_and_names_what_is_wrong() -> None:
    assert faults("serve", SERVE) == []
    for right, wrong, path in (
        ("port = 80", "port = 65536", "$.port"),
        ("port = 80", "prot = 80", "$"),
        ("1e2", '"long"', "$.deadline"),
        ('"float32"', '"float23"', "$.dtype"),
        ('["https://a.example"]', "[1]", "$.cors_origins[0]"),
        ("sha256:", "", "$.keys.alice.hash"),
        ("hash =", "hahs =", "$.keys.alice"),
    ):
        assert path in faults("serve", SERVE.replace(right, wrong)), wrong


def test_a_schema_has_no_key_that_is_refused() -> None:
    properties = schema_of("distill")["properties"]
    assert "examples" not in properties["initialization"]["enum"]
    assert not {"method", "train", "hold_out", "report_examples"} & properties.keys()


def test_a_schema_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.schema.json"
    assert run("config", "schema", "serve", "--output", str(path)) == (f"{path}\n", "")
    assert json.loads(path.read_text(encoding="utf-8")) == schema_of("serve")


def test_alone_it_explains_itself_and_a_schema_needs_a_name() -> None:
    assert run("config") == run("config", "--help")
    with pytest.raises(ConfigError):
        call("config", "schema")


@pytest.mark.parametrize(
    ("words", "expected"), [(("--shard", "--no-shard"), "false"), (("--no-shard", "--shard", "--shard"), "true")]
)
def test_the_last_of_repeated_switches_wins(words: tuple[str, ...], expected: str) -> None:
    out, _ = run("train", "--print-config", *words)
    assert f"shard = {expected}" in out.splitlines()
