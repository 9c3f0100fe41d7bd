"""The OpenAPI document: complete, without secrets, and in agreement with what the server accepts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from fastapi import FastAPI
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator

from prefixtune.server.api.openai_protocol import ChatRequest, CompletionRequest
from prefixtune.server.api.openapi import openapi_document
from prefixtune.server.api.protocol import parse
from prefixtune.server.api.task_protocol import parse_task
from prefixtune.server.app import ROUTES
from prefixtune.server.auth import hash_key
from prefixtune.server.limits import Limits
from prefixtune.server.responses import ApiError
from prefixtune.server.settings import KeyConfig, ServeConfig

LIMITS = Limits(max_tokens=100, max_texts=6)
HUGE = 10**400
USER = {"role": "user", "content": "hi"}
PARTS = [{"type": "text", "text": "a"}, {"type": "text", "text": "", "more": 1}]

VALUES: list[Any] = [
    None, True, False, 0, 0.0, 1, 1.0, -1, 0.5, 1.5, 2, 2.5, 5, 6, 7, 10, 10.5, 20, 21, 100, 101, 100.0, 1_000_000,
    1_000_001, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, HUGE, -HUGE, 1e300, "", "a", "5", "none", "auto", "medium",
    "x" * 256, "x" * 257, "\U0001f686" * 256, [], [""], ["a"], ["a", ""], ["a"] * 6, ["a"] * 7, ["a"] * 16, ["a"] * 17,
    ["x" * 257], [1], [1.0, 2], [1.5], [1] * 50, [True], [None], [1, "a"], [[]], [[1], [2]], [[1], []], [[1], 2],
    [[1], ["a"]], [[1.0]], [[1]] * 6, [[1]] * 7, ["text"], ["audio"], {}, {"a": 1}, {"type": "text"},
    {"type": "json_object"}, {"include_usage": True}, {"include_usage": None}, {"include_usage": 1},
    {"include_obfuscation": 3}, {"include_usages": True}, [USER], [USER, {}], [USER, USER], ["hi"],
    [{"role": "tool", "content": "x"}], [{"role": "user"}], [{"role": "user", "content": None}],
    [{"role": "developer", "content": PARTS, "name": 3, "refusal": {}}], [{"role": "user", "content": []}],
    [{"role": "user", "content": [{"type": "image_url"}]}], [{"role": "user", "content": [{"type": "text"}]}],
    [{**USER, "tool_calls": []}], [{**USER, "tool_calls": None}], [{**USER, "tool_calls": [{}]}], [{**USER, "x": 0}],
    [{"role": ["user"], "content": ""}],
]  # fmt: skip

# Other fields that a field needs: the document says so in words only.
COMPANIONS: dict[str, dict[str, Any]] = {"stream_options": {"stream": True}, "top_logprobs": {"logprobs": True}}
COLUMNS = ("name", "food")


def document(**options: Any) -> dict[str, Any]:
    return openapi_document(FastAPI(routes=ROUTES), ServeConfig(**options), LIMITS)


def validator(name: str) -> Draft202012Validator:
    return Draft202012Validator({**document(), "$ref": f"#/components/schemas/{name}"})


def accepts(kind: str, body: Mapping[str, Any]) -> bool:
    try:
        if kind == "TaskRequest":
            parse_task(body, LIMITS, COLUMNS)
        else:
            parse({"CompletionRequest": CompletionRequest, "ChatRequest": ChatRequest}[kind], body, LIMITS)
    except ApiError:
        return False
    return True


REQUIRED: dict[str, dict[str, Any]] = {
    "CompletionRequest": {"model": "m", "prompt": "text"},
    "ChatRequest": {"model": "m", "messages": [USER]},
    "TaskRequest": {"source": "text"},
}


def body_with(kind: str, name: str, value: Any) -> dict[str, Any]:
    """A body that is valid, except perhaps for one field."""
    if name == "fields" and value and isinstance(value, dict):
        return {"fields": dict.fromkeys(COLUMNS, value)}
    if name == "source":
        return {name: value} if isinstance(value, str) else {"food": "soup", name: value}
    return {**REQUIRED[kind], **COMPANIONS.get(name, {}), name: value}


@pytest.mark.parametrize("kind", REQUIRED)
def test_the_document_allows_what_is_accepted_and_nothing_else(kind: str) -> None:
    described = document()["components"]["schemas"][kind]["properties"]
    names, allows = list(described), validator(kind)
    # Any other field of a task may be its own.
    for name in (*names, *(() if kind == "TaskRequest" else ("unknown", "max_token"))):
        outcomes = set()
        for value in VALUES:
            body = body_with(kind, name, value)
            assert accepts(kind, body) == allows.is_valid(body), (name, value)
            outcomes.add(accepts(kind, body))
        assert True in outcomes or name not in names
        assert False in outcomes or described.get(name, {}).get("description") == "Ignored."
    if kind != "TaskRequest":
        for name in REQUIRED[kind]:
            body = {field: value for field, value in REQUIRED[kind].items() if field != name}
            assert not accepts(kind, body)
            assert not allows.is_valid(body)


def test_a_tasks_own_fields_may_be_beside_the_options() -> None:
    allows = validator("TaskRequest")
    for body in ({"name": "Aromi", "food": 3}, {"fields": {"name": "Aromi"}, "max_tokens": 5}, {"source": "a"}):
        assert accepts("TaskRequest", body)
        assert allows.is_valid(body)


def test_documented_defaults_are_the_real_ones() -> None:
    schemas = document()["components"]["schemas"]
    plain = parse(CompletionRequest, REQUIRED["CompletionRequest"], LIMITS)
    defaults = {
        name: field["default"]
        for name, field in schemas["CompletionRequest"]["properties"].items()
        if "default" in field
    }
    assert defaults == {
        "min_tokens": plain.sampling(LIMITS).min_new_tokens,
        "temperature": plain.sampling(LIMITS).temperature,
        "top_p": plain.sampling(LIMITS).top_p,
        "top_k": plain.sampling(LIMITS).top_k,
        "repetition_penalty": plain.sampling(LIMITS).repetition_penalty,
        "min_p": plain.sampling(LIMITS).min_p,
        "presence_penalty": plain.sampling(LIMITS).presence_penalty,
        "frequency_penalty": plain.sampling(LIMITS).frequency_penalty,
        "n": plain.n,
        "echo": plain.echo,
        "stream": plain.stream,
    }
    numbers = {"min_tokens": 0, "temperature": 1, "top_p": 1, "top_k": 0, "repetition_penalty": 1, "n": 1}
    assert defaults == numbers | {"stream": False, "echo": False} | dict.fromkeys(
        ("min_p", "presence_penalty", "frequency_penalty"), 0
    )
    task = parse_task(REQUIRED["TaskRequest"], LIMITS, ())
    assert schemas["TaskRequest"]["properties"]["temperature"]["default"] == task.sampling(LIMITS).temperature


def test_it_is_openapi_and_contains_the_limits() -> None:
    openapi_json = document(max_body_kib=3, max_upload_mib=5)
    OpenAPIV31SpecValidator(openapi_json).validate()
    assert "3,072 bytes" in openapi_json["paths"]["/v1/completions"]["post"]["requestBody"]["description"]
    assert "5,242,880 bytes" in openapi_json["paths"]["/admin/prefixes/{name}"]["put"]["requestBody"]["description"]
    schemas = openapi_json["components"]["schemas"]
    assert schemas["ChatRequest"]["properties"]["max_completion_tokens"]["maximum"] == 100
    assert schemas["CompletionRequest"]["properties"]["n"]["maximum"] == 6
    names = [operation["operationId"] for methods in openapi_json["paths"].values() for operation in methods.values()]
    assert len(set(names)) == len(names)


def test_only_a_server_with_keys_has_a_security_scheme() -> None:
    with_key = document(keys={"me": KeyConfig(hash=hash_key("pt-x"))})
    assert with_key["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert with_key["paths"]["/v1/models"]["get"]["security"] == [{"key": []}]
    assert "securitySchemes" not in document()["components"]


def test_it_contains_nothing_secret() -> None:
    keys = {
        "acme": KeyConfig(hash=hash_key("pt-x"), prefixes=("acme-*",)),
        "boss": KeyConfig(hash=hash_key("pt-y"), admin=True),
    }
    openapi_json = json.dumps(
        document(keys=keys, backbone="/srv/models/tiny", prefixes="/srv/prefixes", host="10.1.2.3")
    )
    for secret in ("acme", "boss", "sha256", "/srv", "tiny", "10.1.2.3"):
        assert secret not in openapi_json


def test_endpoints_with_a_limit_say_so() -> None:
    paths = document()["paths"]
    for path, method in (
        ("/v1/models/{name}", "get"),
        ("/v1/models/{name}", "delete"),
        ("/v1/models/{name}/file", "get"),
        ("/v1/tasks/{name}", "get"),
        ("/v1/files", "get"),
        ("/v1/files/{file_id}", "delete"),
    ):
        assert "429" in paths[path][method]["responses"], (method, path)
