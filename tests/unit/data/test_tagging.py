"""Tagging: tokens and tags and the error for a wrong sentence."""

import json

import pytest

from data_files import write
from prefixtune.data import TASKS, read_task
from prefixtune.errors import DataError

ROWS = [
    {"tokens": ["The", "Grey", "Wolf", "left"], "tags": ["O", "B-TRAIN", "I-TRAIN", "O"]},
    {"tokens": ["Westport", "!"], "tags": ["B-STATION", "O"]},
]


def test_tokens_and_tags_of_a_sentence(tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, [*ROWS, ROWS[0]])))
    examples = read_task("tagging", path)
    # Each sentence stays its own example.
    assert [(example.source, example.targets) for example in examples] == [
        ("The Grey Wolf left", ("O B-TRAIN I-TRAIN O",)),
        ("Westport !", ("B-STATION O",)),
        ("The Grey Wolf left", ("O B-TRAIN I-TRAIN O",)),
    ]
    assert dict(examples[1].fields) == {"tokens": ("Westport", "!"), "tags": ("B-STATION", "O")}
    assert TASKS["tagging"].kind == "tagging"


def test_other_columns_may_be_named_and_i_may_begin_a_span_as_in_older_files(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"words": ["Hello"], "ner": ["I-X"], "tokens": 3}')
    (example,) = read_task("tagging", path, source="words", target="ner")
    assert dict(example.fields) == {"tokens": ("Hello",), "tags": ("I-X",)}


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.jsonl", '{"tokens": ["a"], "tags": ["O"]}\n{"tokens": ["a", "b"], "tags": ["O"]}', "line 2: 'tags'"),
        ("a.jsonl", '{"tokens": ["10\\u00a0000"], "tags": ["O"]}', "line 1: 'tokens'"),
        ("a.jsonl", '{"tokens": ["a"], "tags": ["NN"]}', "line 1: 'tags' is 'NN'"),
    ],
)
def test_a_wrong_sentence_is_named_with_its_line(tmp_path, name, text, says):
    path = write(tmp_path / name, text)
    with pytest.raises(DataError, match=says) as caught:
        read_task("tagging", path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
