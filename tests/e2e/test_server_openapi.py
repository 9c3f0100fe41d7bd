"""A real server against its own document: routes, responses, and random requests that try to break it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from jsonschema import Draft202012Validator
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks as openapi_checks

from live_server import MODEL, LiveServer, make_model, make_prefix
from prefixtune.backbone.load import load_backbone
from prefixtune.jobs.events import JobEvents, Progress
from prefixtune.jobs.folder import DataFolder
from prefixtune.server import playground
from prefixtune.server.app import ROUTES
from prefixtune.server.auth import hash_key, new_key

KEY = new_key()
JOBS = "/v1/fine_tuning/jobs"
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}: {food}"}
EXAMPLES = 40
"""For each operation, good ones and bad ones: half a minute in all."""
GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [
    pytest.param(method, route.path_format, mode, id=f"{method} {route.path_format} {mode.value}")
    for route in (*ROUTES, *playground.router.routes)
    if route.include_in_schema
    for method in sorted(route.methods)
    # An empty schema allows anything.
    for mode in ([GOOD, BAD] if route.openapi_extra else [GOOD])
]
CHECKS = [
    schemathesis.checks.not_a_server_error,
    openapi_checks.status_code_conformance,
    openapi_checks.content_type_conformance,
    openapi_checks.response_headers_conformance,
    openapi_checks.response_schema_conformance,
    openapi_checks.negative_data_rejection,
    openapi_checks.unsupported_method,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interface")
    make_model(folder / MODEL)
    (folder / "prefixes").mkdir()
    backbone = load_backbone(folder / MODEL, dtype="float32", device="cpu")
    for seed, (name, task) in enumerate((("mine", "records"), ("spare", "records"), ("pubs", "e2e"))):
        text_format = FORMAT if task == "records" else {**FORMAT, "source": ""}
        make_prefix(backbone, folder / "prefixes" / f"{name}.safetensors", seed, task=task, text_format=text_format)
    (folder / "serve.toml").write_text(
        "max_tokens = 6\ndefault_max_tokens = 6\nmax_texts = 4\nmax_body_kib = 64\n"
        # Jobs are taken, and nobody trains them.
        f'train_workers = 0\ndata_folder = "{folder / "data"}"\ndatabase_url = "sqlite:///{folder / "jobs.sqlite"}"\n'
        f'[keys.me]\nhash = "{hash_key(KEY)}"\nadmin = true\n'
    )
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[LiveServer]:
    server = LiveServer(folder / MODEL, folder / "prefixes", "--config", str(folder / "serve.toml")).wait()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def document(server: LiveServer) -> dict[str, Any]:
    status, document, headers = server.get("/openapi.json", key=KEY)
    assert (status, headers["content-type"]) == (200, "application/json")
    return document


@pytest.fixture(scope="module")
def hostile(document: dict[str, Any]) -> Any:
    """The document, narrowed to names that there are, and to replies that hold nothing besides."""
    narrow = copy.deepcopy(document)
    schemas = narrow["components"]["schemas"]
    for schema in schemas.values():
        close(schema)
    for name in ("CompletionRequest", "ChatRequest"):
        schemas[name]["properties"]["model"] = {"enum": ["mine", "pubs", MODEL]}
    # Whatever JSON has, as a field of a task.
    task = schemas["TaskRequest"]
    options = {name: task["properties"][name] for name in task["properties"] if name not in ("source", "fields")}
    options.pop("format_of")
    task |= {"properties": {**options, "name": {}, "food": {}}, "required": ["name", "food"]}
    task["additionalProperties"] = False
    for path, methods in narrow["paths"].items():
        for method, operation in methods.items():
            for parameter in operation.get("parameters", ()):
                if parameter["in"] != "path":
                    continue
                changes = "admin" in path or (method == "delete" and path.startswith("/v1/models"))
                parameter["schema"] = {"enum": ["spare", "new"] if changes else ["mine"]}
    config = SchemathesisConfig.from_dict(
        {"generation": {"with-security-parameters": False, "database": "none"}, "seed": 1}
    )
    return schemathesis.openapi.from_dict(narrow, config=config)


NAMED = {
    "/v1/models/": "name",
    "/v1/tasks/": "name",
    "/admin/prefixes/": "name",
    "/v1/files/": "file_id",
    "/v1/fine_tuning/jobs/": "job_id",
}
"""Beginnings of paths -> what follows."""


BOUNDARY = "boundary-1"


def form(purpose: str, name: str, content: str) -> bytes:
    """The body of an upload."""
    parts = (
        f'Content-Disposition: form-data; name="purpose"\r\n\r\n{purpose}',
        f'Content-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n{content}',
    )
    return "".join(f"--{BOUNDARY}\r\n{part}\r\n" for part in parts).encode() + f"--{BOUNDARY}--\r\n".encode()


def close(schema: Any) -> None:
    """Allow no other properties in objects than the documented ones."""
    if isinstance(schema, dict):
        if "properties" in schema:
            schema.setdefault("additionalProperties", False)
        for each in schema.values():
            close(each)
    elif isinstance(schema, list):
        for each in schema:
            close(each)


def test_the_document_is_openapi(document: dict[str, Any]) -> None:
    OpenAPIV31SpecValidator(document).validate()


def test_real_responses_match_the_document(document: dict[str, Any], server: LiveServer, folder: Path) -> None:
    closed = copy.deepcopy(document)
    close(closed["components"]["schemas"])
    seen, answers = set(), list[Any]()

    def check(method: str, path: str, status: int, body: Any = None, *, key: str = KEY, **more: Any) -> None:
        route = path
        for prefix, name in NAMED.items():
            if path.startswith(prefix):
                _, slash, action = path.removeprefix(prefix).partition("?")[0].partition("/")
                route = f"{prefix}{{{name}}}{slash}{action}"
        actual, answer, headers = server.request(method, path, body, key=key, headers=more)
        assert actual == status, answer
        described = closed["paths"][route][method.lower()]["responses"][str(status)]
        if "$ref" in described:
            described = closed["components"]["responses"][described["$ref"].rpartition("/")[2]]
        kind = headers.get("content-type", "").partition(";")[0]
        assert (kind in described.get("content", ())) == (status != 204)
        seen.add((method, route, status, kind))
        answers.append(answer)
        if kind == "application/json":
            fits(described["content"][kind]["schema"], answer)
        elif kind == "text/event-stream":
            (event,) = described["content"][kind]["schema"]["properties"].values()
            *events, last = [part for part in answer.split("\n\n") if part]
            assert last == "data: [DONE]"
            assert len(events) > 1
            for part in events:
                fits(event["anyOf"][1]["contentSchema"], json.loads(part.removeprefix("data: ")))

    def fits(schema: dict[str, Any], value: Any) -> None:
        Draft202012Validator({**schema, "components": closed["components"]}).validate(value)

    for path in (
        "/v1/models",
        "/v1/status",
        "/admin/prefixes",
        "/healthz",
        "/readyz",
        "/metrics",
        "/",
        "/train",
        "/docs",
        "/openapi.json",
    ):
        check("GET", path, 200)
    for name in ("mine", "pubs", MODEL):
        check("GET", f"/v1/models/{name}", 200)
        check("GET", f"/v1/tasks/{name}", 200)
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    for more in ({}, {"logprobs": 2}, {"logprobs": 0, **usage}, {"n": 2, "stream": True, "stop": ["e"]}):
        check("POST", "/v1/completions", 200, {"model": "mine", "prompt": "a", "seed": 3, **more})
    for more in ({"max_tokens": 0}, {"stream": True}, {"logit_bias": {"5": -2}, "min_p": 0.1, "frequency_penalty": 1}):
        body = {"model": MODEL, "prompt": [5, 6], "echo": True, "logprobs": 1, **more}
        check("POST", "/v1/completions", 200, body)
    check("POST", "/classify", 200, {"model": MODEL, "input": ["a", "b c"], "labels": ["yes", "no"]})
    check("POST", "/classify", 400, {"model": "mine", "input": "a"})
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    for more in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 2, **usage}, {"n": 2, "stream": True}):
        check("POST", "/v1/chat/completions", 200, {"model": "pubs", "messages": messages, "seed": 3, **more})
    for more in ({}, {"stream": True}):
        check("POST", "/v1/tasks/mine", 200, {"name": "Aromi", "food": "soup", "min_tokens": 6, **more})
    check("POST", f"/v1/tasks/{MODEL}", 200, {"source": "a", "format_of": "pubs"})
    file = (folder / "prefixes" / "pubs.safetensors").read_bytes()
    for first, second in (("PUT", "POST"), ("POST", "PUT")):
        check(first, "/admin/prefixes/fresh", 201, file)
        check(second, "/admin/prefixes/fresh", 200, file)
        check("GET", "/admin/prefixes/fresh", 200)
        check("DELETE", "/admin/prefixes/fresh", 204)
    check("PUT", "/admin/prefixes/fresh", 201, file)
    check("GET", "/v1/models/fresh/file", 200)
    check("DELETE", "/v1/models/fresh", 200)
    check("DELETE", "/v1/models/fresh", 404)
    check("DELETE", f"/v1/models/{MODEL}", 403)
    check("POST", "/admin/reload", 200, {})

    rows = "".join(json.dumps({"prompt": f"q{n}", "completion": f"a{n}"}) + "\n" for n in range(9))
    multipart = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    for purpose, name, content in (("document", "a.md", "Some words."), ("fine-tune", "a.jsonl", rows)):
        check("POST", "/v1/files", 200, form(purpose, name, content), **multipart)
        uploaded = answers[-1]["id"]
        for action in ("", "/content", "/preview"):
            check("GET", f"/v1/files/{uploaded}{action}", 200)
    check("GET", "/v1/files", 200)
    options = {"name": "new", "start": "words"}
    job = {"model": MODEL, "training_file": uploaded, "validation_file": uploaded, "prefixtune": options}
    check("POST", JOBS, 200, {**job, "metadata": {"a": "b"}, "hyperparameters": {"n_epochs": "auto"}})
    created = answers[-1]["id"]
    events = JobEvents(DataFolder(folder / "data").job(created))
    for step in (1, 2):
        events.add("a step", data={"step": step, "train_loss": 2.5})
    events.write_progress(Progress(step=1, total_steps=2, loss=2.5, seconds_left=1.5))
    check("GET", JOBS, 200)
    for action in ("", "/events", "/checkpoints"):
        check("GET", f"{JOBS}/{created}{action}", 200)
    for action in ("pause", "resume", "cancel"):
        check("POST", f"{JOBS}/{created}/{action}", 200, {})
    check("GET", f"{JOBS}/{created}/events?stream=true", 200)
    check("POST", f"{JOBS}/{created}/cancel", 400, {})
    check("POST", JOBS, 400, {**job, "prefixtune": {"name": "mine"}})
    check("POST", JOBS, 404, {**job, "training_file": "file-none"})
    check("DELETE", f"/v1/files/{uploaded}", 200)

    check("PUT", "/admin/prefixes/fresh", 400, file[:-1])
    check("POST", "/v1/completions", 400, {"model": "mine"})
    check("POST", "/v1/completions", 400, b"{")
    check("POST", "/v1/completions", 413, {"model": "mine", "prompt": "a" * 70_000})
    check("POST", "/v1/completions", 415, b"a=b", **{"Content-Type": "text/plain"})
    for method, path in (
        ("GET", "/v1/models"),
        ("GET", "/metrics"),
        ("GET", "/openapi.json"),
        ("POST", "/admin/reload"),
    ):
        check(method, path, 401, {} if method == "POST" else None, key="pt-none")
    for path in ("/v1/models/no", "/v1/tasks/no", "/admin/prefixes/no"):
        check("GET", path, 404)
    # Every documented success was seen.
    every = {
        (method.upper(), path, int(status), kind)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        for status, described in operation["responses"].items()
        if int(status) < 400
        for kind in described.get("content", {"": None})
    }
    assert every <= seen


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_random_requests_get_a_documented_response(
    hostile: Any, server: LiveServer, method: str, path: str, mode: schemathesis.GenerationMode
) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(case=hostile[path][method].as_strategy(generation_mode=mode))
    def one(case: schemathesis.Case) -> None:
        response = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"})
        case.validate_response(response, checks=CHECKS)

    one()
    assert server.get("/healthz")[0] == 200
