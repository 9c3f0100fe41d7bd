"""A task's own fields become the same sources as the files that training reads."""

import json

import pytest

from prefixtune.data import read_task
from prefixtune.errors import DataError
from prefixtune.server.api.tasks import task_schema_of

TRIPLES = [["Aarhus Airport", "cityServed", "Aarhus, Denmark"], ["Aarhus", "LEADER_NAME", " Jacob\nBundsgaard "]]
CASES = [
    ("e2e", "", {"mr": "name[The Vaults], eatType[pub], priceRange[more than £30]"}, {"references": ["x"]}),
    ("webnlg", "", {"triples": TRIPLES}, {"references": ["x"]}),
    ("summarization", "", {"document": "Two\nlines, {braces} and all."}, {"summary": "x"}),
    ("summarization", "{title}: {body}", {"title": "A", "body": "b\nc"}, {"summary": "x"}),
    ("records", "{name} is {food}, {{sic}}", {"name": " Aromi", "food": 3}, {}),
    ("records", "{temperature.max} at {the place}", {"temperature.max": 3.5, "the place": True}, {}),
]


@pytest.mark.parametrize(("task", "template", "fields", "more"), CASES)
def test_the_source_is_that_of_the_file(task, template, fields, more, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**fields, **more}) + "\n", encoding="utf-8")
    (example,) = read_task(task, path, source=template or None)
    schema = task_schema_of({"task": task, "text_format": {"source": template}})
    assert set(schema.columns) == set(fields)
    assert schema.source(fields) == example.source


def test_examples_of_fields_are_valid():
    for task in ("e2e", "webnlg", "dart", "toy"):
        schema = task_schema_of({"task": task})
        assert schema.source({field["name"]: field["example"] for field in schema.fields})


@pytest.mark.parametrize(
    ("header", "record"),
    [
        ({"task": "e2e"}, {"mr": "name[a], nmae[b]"}),
        ({"task": "e2e"}, {}),
        ({"task": "webnlg"}, {"triples": [["a", "b"]]}),
        ({"task": "records", "text_format": {"source": "{a} {b}"}}, {"a": "1"}),
        ({"task": "records", "text_format": {"source": "a"}}, {"a": ["1"]}),
        ({"task": "summarization"}, {"document": " "}),
    ],
)
def test_wrong_fields_are_data_errors(header, record):
    schema = task_schema_of(header)
    with pytest.raises(DataError):
        schema.source(record)


def test_headers_without_fields():
    templates = ("", "{unclosed", ["a"])
    odd = [{"task": "records", "text_format": {"source": source}} for source in templates]
    for header in ({}, {"task": "records"}, *odd, {"task": ["e2e"]}, {"task": "mystery", "text_format": "no table"}):
        assert task_schema_of(header) is None


def test_a_template_of_a_header_is_filled_in_and_never_executed():
    schema = task_schema_of({"task": "records", "text_format": {"source": "{a.__class__} {a!r} {0} {{{{ 7*7 }}}}"}})
    assert schema.columns == ("a.__class__", "a!r", "0")
    assert schema.source({"a.__class__": "x", "a!r": "y", "0": "z"}) == "x y z {{ 7*7 }}"
