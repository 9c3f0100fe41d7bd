"""Tagging: tokens and tags from JSON and from CoNLL files, the set of tags, and the error for a wrong sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.errors import DataError

ROWS = [
    {"tokens": ["The", "Grey", "Wolf", "left"], "tags": ["O", "B-TRAIN", "I-TRAIN", "O"]},
    {"tokens": ["Westport", "!"], "tags": ["B-STATION", "O"]},
]
LINES = "The O\nGrey B-TRAIN\nWolf I-TRAIN\nleft O\n\nWestport B-STATION\n! O\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.jsonl", "\n".join(map(json.dumps, ROWS))),
        ("a.conll", LINES),
        ("a.TXT", "\ufeff" + LINES.replace("\n", "\r\n")),
        ("a.conll.gz", "\n\n" + LINES.strip().replace("\n\n", "\n \n\t\n")),
        ("a.txt", LINES.replace(" ", "  X  _ ")),
        ("a.txt", "-DOCSTART- -X- O\n\n" + LINES.replace("\n\n", "\n-DOCSTART- O\n")),
        ("a.txt", "# id = 1\n" + LINES.replace("left", "# a remark\nleft")),
    ],
)
def test_every_format_gives_the_same(tmp_path: Path, name: str, text: str):
    path = write(tmp_path / name, text)
    examples = read_task("tagging", path)
    assert [(example.source, example.targets) for example in examples] == [
        ("The Grey Wolf left", ("O B-TRAIN I-TRAIN O",)),
        ("Westport !", ("B-STATION O",)),
    ]
    assert [dict(example.fields) for example in examples] == [
        {name: tuple(values) for name, values in row.items()} for row in ROWS
    ]
    assert TASKS["tagging"].kind == "tagging"


def test_other_columns_may_be_named(tmp_path: Path):
    path = write(tmp_path / "a.jsonl", '{"words": ["Hello"], "ner": ["O"], "tokens": 3}')
    (example,) = read_task("tagging", path, source="words", target="ner")
    assert dict(example.fields) == {"tokens": ("Hello",), "tags": ("O",)}
    lines = write(tmp_path / "a.conll", LINES)
    with pytest.raises(DataError, match="'ner'"):
        read_task("tagging", lines, target="ner")


def test_each_sentence_stays_its_own_example(tmp_path: Path):
    assert len(read_task("tagging", write(tmp_path / "a.txt", "Hello O\n\nHello O\n"))) == 2


@pytest.mark.parametrize("text", ["Late O\n#fail O\n# O\n", "#fail\tO\nLate\tO\n#\tB-X\n# to be checked\n"])
def test_a_token_may_start_with_a_number_sign(tmp_path: Path, text: str):
    (example,) = read_task("tagging", write(tmp_path / "a.txt", text))
    assert sorted(example.fields["tokens"]) == ["#", "#fail", "Late"]


def test_i_may_begin_a_span_as_in_older_files(tmp_path: Path):
    (example,) = read_task("tagging", write(tmp_path / "a.txt", "Westport I-STATION\nOldbridge B-STATION\n"))
    assert example.fields["tags"] == ("I-STATION", "B-STATION")


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a", "b"], "tags": ["O"]}', "line 2: 'tags'"),
        ("a.jsonl", '{"words": ["a"], "tags": ["O"]}', "line 1 has the columns words, tags"),
        ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', "line 1: 'tokens' is 'a b'; a list"),
        ("a.jsonl", '{"tokens": ["10\\u00a0000"], "tags": ["O"]}', "line 1: 'tokens'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["NN"]}', "line 1: 'tags' is 'NN'"),
        ("a.txt", "a O\n\nb\n", "line 3"),
        ("a.txt", "a O\n\nb O\nNew York\tB-X\n", "line 3: 'tokens' is 'New York'"),
        ("a.txt", "# one\na S-X\n", "line 2: 'tags' is 'S-X'"),
        ("a.conll", "\n", "a.conll has no rows"),
        ("a.csv", "a,b", r"\.jsonl, \.json, \.parquet, \.conll, \.bio, \.txt"),
    ],
)
def test_a_wrong_sentence_is_named_with_its_line(tmp_path: Path, name: str, text: str, says: str):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_task("tagging", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
