"""Summaries: the well-known sets' columns, templates, SciTLDR as released and as JSON lines, and wrong rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.errors import ConfigError, DataError


@pytest.mark.parametrize(
    ("task", "name", "text"),
    [
        ("summarization", "a.jsonl", '{"document": "It rained.\\nA lot. ", "summary": "Rain.", "id": "7"}'),
        ("summarization", "a.jsonl", '{"article": "It rained. \\n A lot.", "highlights": " Rain. ", "id": "7"}'),
        ("summarization", "a.csv", 'id,document,summary\n7,"It rained.\r\nA lot.",Rain.\n'),
    ],
)
def test_the_well_known_columns_need_no_names(tmp_path: Path, task: str, name: str, text: str):
    (example,) = read_task(task, write(tmp_path / name, text))
    assert (example.source, example.targets) == ("It rained. A lot.", ("Rain.",))


def test_columns_may_be_named(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"title": "Weather", "body": "It rained.", "short": ["Rain.", "Wet\\nday."]}')
    for task in ("summarization",):
        (example,) = read_task(task, path, source="{title}: {body}", target="short")
        assert (example.source, example.targets) == ("Weather: It rained.", ("Rain.", "Wet day."))
        assert example.fields["title"] == "Weather"
        with pytest.raises(ConfigError, match="template"):
            read_task(task, path, source="{title")


def test_equal_documents_stay_apart(tmp_path: Path):
    path = write(tmp_path / "a.csv", "document,summary\nx,a\nx,b\n")
    assert [example.targets for example in read_task("summarization", path)] == [("a",), ("b",)]


@pytest.mark.parametrize(
    ("task", "name", "text", "says"),
    [
        ("summarization", "a.csv", "text,summary\nx,y\n", "no column 'document' or 'article'"),
        ("summarization", "a.csv", "document,summary\nx,y\n , y\n", "line 3: 'document' gives an empty text"),
        ("scitldr", "a.jsonl", '{"text": "x", "target": ["y"]}', "no column 'document' or 'source'"),
        ("scitldr", "a.jsonl", '{"source": ["x"], "summary": ["y"]}', "no column 'references' or 'target'"),
        ("scitldr", "a.jsonl", '{"source": ["x", 3], "target": ["y"]}', "'source' holds 3; text is needed"),
        ("scitldr", "a.jsonl", '{"source": ["x"], "target": "y"}', "'target' is 'y'; a list"),
    ],
)
def test_a_wrong_row_is_named_with_its_line(tmp_path: Path, task: str, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_task(task, path)
    assert str(path) in str(caught.value)
    assert caught.value.hint


def test_scitldr_as_released_and_as_json_lines(tmp_path: Path):
    released = {
        "source": ["We learn.", " It works.\n"],
        "source_labels": [0, 1],
        "rouge_scores": [0.1, 0.9],
        "paper_id": "x",
        "target": ["Learning works.", "It learns."],
    }
    lines: dict[str, Any] = {"id": "x", "document": "We learn. It works.", "references": released["target"]}
    one = read_task("scitldr", write(tmp_path / "a.jsonl", json.dumps(released)))
    other = read_task("scitldr", write(tmp_path / "b.jsonl", json.dumps(lines)))
    assert one == other
    assert (one[0].source, one[0].targets) == ("We learn. It works.", ("Learning works.", "It learns."))
    assert (one[0].fields["paper_id"], other[0].fields["id"]) == ("x", "x")
    with pytest.raises(ConfigError, match="takes no source"):
        read_task("scitldr", tmp_path / "a.jsonl", source="title")


def test_summaries_are_decoded_as_in_the_paper():
    for name in ("summarization", "scitldr"):
        task = TASKS[name]
        assert task.decoding == {
            "num_beams": 6,
            "min_new_tokens": 11,
            "max_new_tokens": 62,
            "ban_newlines": True,
            "length_penalty": 0.8,
        }
        assert (task.metrics, task.protocol) == (("rouge_1", "rouge_2", "rouge_l"), "summarization")


@pytest.mark.parametrize(
    ("part", "documents", "summaries"), [("train", 1992, 1992), ("dev", 619, None), ("test", 618, None)]
)
def test_the_whole_set(shared_data: Path, part: str, documents: int, summaries: int | None):
    examples = read_task("scitldr", shared_data / "scitldr", split=part)
    assert len(examples) == documents
    assert all(example.targets and "\n" not in "".join((example.source, *example.targets)) for example in examples)
    if summaries is not None:
        assert sum(len(example.targets) for example in examples) == summaries
    (first, *_) = read_task("summarization", shared_data / "scitldr" / f"{part}.jsonl.gz", target="references")
    assert first == examples[0]
