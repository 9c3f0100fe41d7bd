"""Classification: texts and labels from every format, the set of labels, and the error for a wrong row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_files import write
from prefixtune.data import TASKS, Example, label_names, read_task
from prefixtune.data.tasks.classification import read_classification
from prefixtune.errors import ConfigError, DataError

ROWS = [{"text": "A fine, warm bed.", "label": "praise"}, {"text": "Cold soup.", "label": "complaint"}]


def labelled(*labels: str) -> list[Example]:
    return [Example(f"text {number}", (label,)) for number, label in enumerate(labels)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.csv", 'text,label\n"A fine, warm bed.",praise\nCold soup.,complaint\n'),
    ],
)
def test_every_format_gives_the_same(tmp_path: Path, name: str, text: str):
    path = write(tmp_path / name, text)
    examples = read_classification(path)
    assert [(example.source, example.targets) for example in examples] == [
        ("A fine, warm bed.", ("praise",)),
        ("Cold soup.", ("complaint",)),
    ]
    assert examples[0].fields == ROWS[0]
    assert read_task("classification", path) == examples
    assert TASKS["classification"].kind == "classification"


def test_columns_are_named_by_templates(tmp_path: Path):
    path = write(tmp_path / "a.csv", "premise,hypothesis,gold,side\nIt rains.,It is wet.,yes,a\n")
    (example,) = read_classification(path, "{premise} => {hypothesis}", "gold")
    assert (example.source, example.targets) == ("It rains. => It is wet.", ("yes",))
    (example,) = read_task("classification", path, source="premise", target="{side}/{gold}")
    assert (example.source, example.targets) == ("It rains.", ("a/yes",))
    with pytest.raises(ConfigError, match="template"):
        read_classification(path, "{premise", "gold")


def test_each_row_stays_its_own_example(tmp_path: Path):
    rows = "text,label\nFine.,good\nFine.,good\nFine.,bad\n"
    examples = read_classification(write(tmp_path / "a.csv", rows))
    assert [example.targets for example in examples] == [("good",), ("good",), ("bad",)]


@pytest.mark.parametrize(
    ("value", "label"),
    [
        ('"yes"', "yes"),
        ('" very good "', "very good"),
        ("3", "3"),
        ("true", "true"),
        ('["only"]', "only"),
    ],
)
def test_a_label_is_the_text_that_json_writes(tmp_path: Path, value: str, label: str):
    path = write(tmp_path / "a.jsonl", f'{{"text": "x", "label": {value}}}')
    assert read_classification(path)[0].targets == (label,)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "sentence,class\nx,y\n", "line 2: there is no column 'text'"),
        ("a.jsonl", '{"text": "x", "label": "y"}\n\n{"text": "x"}\n', "line 3: there is no column 'label'"),
        ("a.csv", "text,label\nx,y\nx, \n", "line 3: 'label' gives an empty text"),
        ("a.jsonl", '{"text": "x", "label": ["a", "b"]}', "line 1: 'label' holds 2 labels; exactly one"),
        ("a.json", '[{"text": "x", "label": []}]', "item 1: 'label' holds 0 labels"),
        ("a.jsonl", '{"text": "x", "label": 2.5}', "line 1: label 2.5 is not a whole number"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_classification(path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_the_names_are_the_distinct_labels_in_order():
    assert label_names(labelled("b", "a", "b", "c")) == ("a", "b", "c")
    assert label_names(iter(labelled("10", "9"))) == ("10", "9")


@pytest.mark.parametrize(
    ("examples", "says"),
    [
        ([], "no example"),
        (labelled("a", "a"), "all examples have the label 'a'; at least two"),
        ([*labelled("a", "b"), Example("x", ("a", "b"))], r"example 3 \('x'\) has 2 labels"),
        ([Example("x")], r"example 1 \('x'\) has 0 labels"),
    ],
)
def test_one_label_is_no_classification(examples: list[Example], says: str):
    with pytest.raises(DataError, match=says) as caught:
        label_names(examples)
    assert caught.value.hint
