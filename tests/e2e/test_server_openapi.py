"""A real server against its own document: random requests that try to break it."""

import copy

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import OpenAPIV31SpecValidator
from schemathesis.config import SchemathesisConfig
from schemathesis.specs.openapi import checks as openapi_checks

from live_server import MODEL, fill_folder, serve
from prefixtune.server.app import with_routes

KEY = "pt-me"
FORMAT = {"prompt": " {source} {separator}", "target": " {target} ", "source": "{name}: {food}"}
EXAMPLES = 5
"""For each operation, good ones and bad ones."""
GOOD, BAD = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [
    pytest.param(method, path, mode, id=f"{method} {path} {mode.value}")
    for path, methods in with_routes().openapi()["paths"].items()
    for method, operation in methods.items()
    # Without a body nothing can be wrong.
    for mode in ([GOOD, BAD] if "requestBody" in operation else [GOOD])
]
CHECKS = [schemathesis.checks.not_a_server_error, openapi_checks.negative_data_rejection]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("interface")
    prefixes = {name: {"task": "records", "text_format": FORMAT} for name in ("mine", "spare")}
    prefixes["pubs"] = {"task": "e2e", "text_format": {**FORMAT, "source": ""}}
    # Jobs are taken, and nobody trains them.
    settings = "max_tokens = 6\ndefault_max_tokens = 6\nmax_texts = 4\ntrain_workers = 0\n"
    settings += f'data_folder = "{folder / "data"}"\ndatabase_url = "sqlite:///{folder / "jobs.sqlite"}"'
    fill_folder(folder, prefixes, settings, {"me": "admin = true"})
    server = serve(folder)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def document(server):
    status, document, headers = server.get("/openapi.json", key=KEY)
    assert (status, headers["content-type"]) == (200, "application/json")
    return document


@pytest.fixture(scope="module")
def hostile(document):
    """The document, narrowed to names that there are."""
    narrow = copy.deepcopy(document)
    schemas = narrow["components"]["schemas"]
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
                changes = method in ("put", "delete") and path.startswith("/v1/models")
                parameter["schema"] = {"enum": ["spare", "new"] if changes else ["mine"]}
    config = SchemathesisConfig.from_dict(
        {"generation": {"with-security-parameters": False, "database": "none"}, "seed": 1}
    )
    return schemathesis.openapi.from_dict(narrow, config=config)


def test_the_document_is_openapi(document):
    OpenAPIV31SpecValidator(document).validate()


@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_random_requests_are_no_fault_of_the_server(hostile, server, method, path, mode):
    @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=HealthCheck)
    @given(case=hostile[path][method].as_strategy(generation_mode=mode))
    def one(case):
        response = case.call(base_url=server.url, headers={"Authorization": f"Bearer {KEY}"})
        case.validate_response(response, checks=CHECKS)

    one()
    assert server.get("/healthz")[0] == 200
