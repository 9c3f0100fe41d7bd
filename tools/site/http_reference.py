"""The reference of the server's HTTP interface, from its OpenAPI document."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from prefixtune.server.app import DESCRIPTION, with_routes

INTRODUCTION = """\
Made from the document that a server shows at `/openapi.json` (`/docs`: to read and
try). [Serving](serving.md) explains what the endpoints mean, and how errors,
keys and limits work."""

Schema = Mapping[str, Any]


def page() -> str:
    """The reference of the HTTP interface, in Markdown."""
    document = with_routes().openapi()
    parts = ["# HTTP interface", INTRODUCTION, DESCRIPTION, "## Endpoints", "\n".join(_endpoints(document))]
    parts += [block for path, methods in document["paths"].items() for block in _path(path, methods)]
    parts += ["## Bodies"]
    parts += [block for name, schema in document["components"]["schemas"].items() for block in _schema(name, schema)]
    return "\n\n".join(text for part in parts if (text := part.strip())) + "\n"


def _endpoints(document: Schema) -> Iterator[str]:
    yield "| | path | |\n|---|---|---|"
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            summary = operation["description"].partition("\n\n")[0].rstrip(".")
            yield f"| {method.upper()} | [`{path}`](#{_slug(method, path)}) | {_text(summary)} |"


def _path(path: str, methods: Schema) -> Iterator[str]:
    for method, operation in methods.items():
        yield f"### {method.upper()} {path}"
        yield operation["description"]
        parameters = [p for p in operation.get("parameters", ()) if p["in"] == "query"]
        if parameters:
            rows = [f"| `{p['name']}` | {_type(p['schema'])} | {_text(p.get('description', ''))} |" for p in parameters]
            yield "\n".join(["| in the query | type | |", "|---|---|---|", *rows])
        if body := operation.get("requestBody"):
            kinds = ", ".join(f"`{kind}`: {_type(content['schema'])}" for kind, content in body["content"].items())
            yield f"Body: {kinds.rstrip(': ')}. {body.get('description', '')}"
            for content in body["content"].values():
                if fields := content["schema"].get("properties"):
                    required = content["schema"].get("required", ())
                    rows = [
                        f"| `{field}` | {_type(value)} | {'required' * (field in required)} |"
                        for field, value in fields.items()
                    ]
                    yield "\n".join(["| field | type | |", "|---|---|---|", *rows])
                if "example" in content:
                    yield f"```json\n{json.dumps(content['example'], indent=2, ensure_ascii=False)}\n```"
        rows = [f"| {status} | {_response(response)} |" for status, response in operation["responses"].items()]
        yield "\n".join(["| status | response |", "|---|---|", *rows])


def _response(response: Schema) -> str:
    kinds = [
        f"`{kind}`" + (f": {_type(content['schema'])}" if "$ref" in content.get("schema", {}) else "")
        for kind, content in response.get("content", {}).items()
    ]
    description = "" if response.get("description") == "Successful Response" else response.get("description", "")
    return _text("; ".join(part for part in (description.rstrip("."), *kinds) if part))


def _schema(name: str, schema: Schema) -> Iterator[str]:
    yield f"### {name}"
    yield str(schema.get("description", ""))
    if schema.get("properties"):
        yield schema_table(schema)


def schema_table(schema: Schema, without: Collection[str] = ()) -> str:
    """The table of an object's fields, but for some."""
    rows = ["| field | type | default | |", "|---|---|---|---|"]
    for field, value in schema["properties"].items():
        if field not in without:
            default = f"`{json.dumps(value['default'], ensure_ascii=False)}`" if "default" in value else ""
            shown = default or "required" * (field in schema.get("required", ()))
            rows.append(f"| `{field}` | {_type(value)} | {shown} | {_text(value.get('description', ''))} |")
    return "\n".join(rows)


def _type(schema: Schema) -> str:
    """A type in a few words, with its bounds."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(map(_type, schema["anyOf"])))
    if "enum" in schema:
        return ", ".join(f"`{json.dumps(value)}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{json.dumps(schema['const'])}`"
    kind = schema.get("type", "any")
    words = " or ".join(kind) if isinstance(kind, list) else str(kind)
    if kind == "array":
        words = f"list of {_type(schema.get('items', {}))}"
    bounds = {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
        "minItems": "at least",
        "maxItems": "at most",
        "minLength": "of at least",
        "maxLength": "of at most",
    }
    said = [f"{text} {schema[key]:,}" for key, text in bounds.items() if key in schema]
    return _text(" ".join([words, " and ".join(said)]).strip())


def _text(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _slug(method: str, path: str) -> str:
    """The anchor of an operation's heading, as code hosts make it."""
    return "".join(c for c in f"{method} {path}".lower().replace(" ", "-") if c.isalnum() or c in "-_")
