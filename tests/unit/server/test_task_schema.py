"""A task's own fields become the very sources that training read from its files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from prefixtune.data import TASKS, read_task
from prefixtune.errors import DataError
from prefixtune.server.models.task_schema import task_decoding, task_schema_of

TRIPLES = [["Aarhus Airport", "cityServed", "Aarhus, Denmark"], ["Aarhus", "LEADER_NAME", " Jacob\nBundsgaard "]]
CASES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("e2e", "", {"mr": "name[The Vaults], eatType[pub], priceRange[more than £30]"}, {"references": ["x"]}),
    ("webnlg", "", {"triples": TRIPLES}, {"references": ["x"]}),
    ("dart", "", {"triples": TRIPLES}, {"references": ["x"]}),
    ("summarization", "", {"document": "Two\nlines, {braces} and all."}, {"summary": "x"}),
    ("xsum", "", {"document": "Two\nlines."}, {"summary": "x"}),
    ("summarization", "{title}: {body}", {"title": "A", "body": "b\nc"}, {"summary": "x"}),
    ("records", "{name} is {food}, {{sic}}", {"name": " Aromi", "food": 3}, {}),
    ("records", "question", {"question": "Who?\nYou?"}, {}),
    ("records", "{temperature.max} at {the place}", {"temperature.max": 3.5, "the place": True}, {}),
]


@pytest.mark.parametrize(("task", "template", "fields", "more"), CASES)
def test_the_source_is_that_of_the_file(
    task: str, template: str, fields: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps({**fields, **more}) + "\n", encoding="utf-8")
    (example,) = read_task(task, path, source=template or None)
    form = task_schema_of({"task": task, "text_format": {"source": template}})
    assert form is not None
    assert set(form.columns) == set(fields)
    assert form.source(fields) == example.source


def test_the_made_tables_source_is_that_of_its_set() -> None:
    form = task_schema_of({"task": "toy"})
    assert form is not None
    for example in read_task("toy", "held_out")[:10]:
        assert form.source(example.fields) == example.source


def test_examples_of_forms_are_good_ones() -> None:
    for task in ("e2e", "webnlg", "dart", "toy"):
        form = task_schema_of({"task": task})
        assert form is not None
        assert form.source({field.name: field.example for field in form.fields})
        # A page makes its form of this.
        assert json.loads(json.dumps(form.describe()))[0]["name"] == form.columns[0]


@pytest.mark.parametrize(
    ("header", "record"),
    [
        ({"task": "e2e"}, {"mr": "name[a], nmae[b]"}),
        ({"task": "e2e"}, {"mr": 3}),
        ({"task": "e2e"}, {}),
        ({"task": "webnlg"}, {"triples": [["a", "b"]]}),
        ({"task": "webnlg"}, {"triples": "a | b | c"}),
        ({"task": "records", "text_format": {"source": "{a} {b}"}}, {"a": "1"}),
        ({"task": "records", "text_format": {"source": "a"}}, {"a": ["1"]}),
        ({"task": "summarization"}, {"document": " "}),
        ({"task": "toy"}, {"train": "Heron"}),
    ],
)
def test_wrong_fields_are_the_requests_fault(header: dict[str, Any], record: dict[str, Any]) -> None:
    form = task_schema_of(header)
    assert form is not None
    with pytest.raises(DataError):
        form.source(record)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"task": "records"},
        {"task": "records", "text_format": {"source": ""}},
        {"task": "records", "text_format": {"source": "{unclosed"}},
        {"task": "records", "text_format": {"source": ["a"]}},
        {"task": ["e2e"]},
        {"task": "mystery", "text_format": "no table"},
    ],
)
def test_headers_that_tell_of_no_fields(header: dict[str, Any]) -> None:
    assert task_schema_of(header) is None


def test_a_template_of_an_artifact_is_filled_in_and_never_run() -> None:
    form = task_schema_of({"task": "records", "text_format": {"source": "{a.__class__} {a!r} {0} {{{{ 7*7 }}}}"}})
    assert form is not None
    assert form.columns == ("a.__class__", "a!r", "0")
    assert form.source({"a.__class__": "x", "a!r": "y", "0": "z"}) == "x y z {{ 7*7 }}"


def test_customary_decoding() -> None:
    assert task_decoding({"task": "e2e"}) == TASKS["e2e"].decoding
    assert task_decoding({"task": ["e2e"]}) == {} == task_decoding({})
