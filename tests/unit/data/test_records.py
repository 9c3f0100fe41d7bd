"""People's own data: templates, formats, merging, and the error for a wrong row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_files import write
from prefixtune.data import read_task
from prefixtune.data.tasks.records import read_records
from prefixtune.data.templates import render
from prefixtune.errors import ConfigError, DataError

ROWS = [{"name": "Aromi", "food": "Italian", "text": "Eat."}, {"name": "Mill", "food": "French", "text": "Go, eat."}]
WANTED = [("Aromi is Italian", ("Eat.",)), ("Mill is French", ("Go, eat.",))]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS)) + "\n\n"),
        ("a.csv.gz", 'name,food,text\r\nAromi,Italian,Eat.\r\n,,\r\nMill,French,"Go, eat."'),
        ("v1.2.tsv.gz", "\ufeffname\tfood\ttext\nAromi\tItalian\tEat.\nMill\tFrench\tGo, eat.\n"),
    ],
)
def test_every_format_gives_the_same(tmp_path: Path, name: str, text: str):
    path = write(tmp_path / name, text)
    examples = read_records(path, "{name} is {food}", "text")
    assert [(example.source, example.targets) for example in examples] == WANTED
    assert [example.fields for example in examples] == ROWS
    assert read_task("records", path, source="{name} is {food}", target="text") == examples


def test_equal_sources_become_one_example_with_all_targets_in_order(tmp_path: Path):
    path = write(
        tmp_path / "a.jsonl",
        '{"q": "b", "a": ["1", "2"], "n": 0}\n{"q": "a", "a": "3"}\n{"q": " b ", "a": ["1", 4]}\n',
    )
    first, second = read_records(path, "q", "a")
    assert (first.source, first.targets) == ("b", ("1", "2", "1", "4"))
    assert first.fields["n"] == 0
    assert (second.source, second.targets) == ("a", ("3",))


def test_without_a_target_there_are_none(tmp_path: Path):
    path = write(tmp_path / "a.csv", "q\nx\ny\n")
    assert [(example.source, example.targets) for example in read_records(path, "q")] == [("x", ()), ("y", ())]


@pytest.mark.parametrize(
    ("template", "record", "text"),
    [
        ("{a}", {"a": "{b}", "b": "no"}, "{b}"),
        ("{{{a}}} }}{{", {"a": "x"}, "{x} }{"),
        ("{a.b} {a[0]} {a!r:>9}", {"a.b": "1", "a[0]": "2", "a!r:>9": "3"}, "1 2 3"),
        ("{customer rating}: {n}, {ok}", {"customer rating": "high", "n": 2.5, "ok": True}, "high: 2.5, true"),
        ("a b", {"a b": "  two\nlines "}, "two\nlines"),
        ("\\1 {a}", {"a": "\\g<0>"}, "\\1 \\g<0>"),
    ],
)
def test_only_whole_columns_are_replaced(template: str, record: dict[str, Any], text: str):
    assert render(template, record, "line 1") == text


def test_a_template_reaches_no_attribute():
    with pytest.raises(DataError, match=r"line 1: there is no column 'a\.__class__'"):
        render("{a.__class__}", {"a": "x"}, "line 1")


@pytest.mark.parametrize("template", ["{a", "a}", "{}", "{a} {", "", "  ", "{{a}}", "{a{b}}"])
def test_a_malformed_template_is_refused_before_the_file_is_read(template: str, tmp_path: Path):
    for source, target in ((template, None), ("a", template)):
        with pytest.raises(ConfigError, match="template") as caught:
            read_records(tmp_path / "missing.csv", source, target)
        assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.csv", "question,a\nx,y\n", "line 2: there is no column 'q'"),
        ("a.csv", "q,a\nx,y\n ,y\n", "line 3: 'q'"),
        ("a.jsonl", '{"q": "x", "a": "y"}\n\n{"q": "x"}\n', "line 3: there is no column 'a'"),
        ("a.jsonl", '{"q": null, "a": "y"}', "line 1: column 'q'"),
        ("a.jsonl", '{"q": ["x"], "a": "y"}', "column 'q'"),
        ("a.jsonl", '{"q": "x", "a": ["y", ""]}', "'a'"),
        ("a.jsonl", '{"q": "x", "a": [["y"]]}', "column 'a'"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_records(path, "q", "a")
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_a_list_is_no_part_of_a_template(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"q": "x", "a": ["y"]}')
    with pytest.raises(DataError, match="column 'a'"):
        read_records(path, "q", "so {a}")


def test_a_target_alone_is_refused_and_nothing_at_all_is_recognized(tmp_path: Path):
    path = write(tmp_path / "a.csv", "q,a\nx,y\n")
    with pytest.raises(ConfigError, match="target is 'a'"):
        read_task("records", path, target="a")
    with pytest.raises(DataError, match=r"a\.csv, line 2 has the columns q, a"):
        read_task("records", path)
