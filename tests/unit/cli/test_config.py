"""`prefixtune config`: JSON schemas that editors complete configuration files by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from command_line import run

NAMES = ("train", "distill", "generate", "classify", "serve", "worker", "engine")


def schema_of(name: str) -> Any:
    return json.loads(run("config", "schema", name)[0])


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


def test_a_schema_has_no_key_that_is_refused() -> None:
    properties = schema_of("distill")["properties"]
    assert "examples" not in properties["initialization"]["enum"]
    assert not {"method", "train", "hold_out", "report_examples"} & properties.keys()


def test_a_schema_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.schema.json"
    assert run("config", "schema", "serve", "--output", str(path)) == (f"{path}\n", "")
    assert json.loads(path.read_text(encoding="utf-8")) == schema_of("serve")
