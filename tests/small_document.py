"""A tiny model of bytes, a document, and questions about it."""

import json

import pytest

import prefixtune.training.silence as silence

DOCUMENT = "The Owl goes to Ashby from platform B. The Fox goes to Dover from platform C."
ROWS = [
    {"question": "Where does the Owl go?", "answer": "Ashby"},
    {"question": "Where does the Fox go?", "answer": "Dover"},
    {"question": "Platform of the Owl?", "answer": "B"},
    {"question": "Platform of the Fox?", "answer": "C"},
]
TEST = [{"question": "Owl platform?", "answer": "B"}, {"question": "Fox town?", "answer": "Dover"}]


REQUESTS = {"train": [["Sing of rain.", "Drip, drop."], ["Count to 3.", "1 2 3"]], "test": ["Sing.", "Count to 9."]}
"""About other things."""


@pytest.fixture
def backbone(tiny_backbone, monkeypatch):
    monkeypatch.setattr(silence, "general_requests", lambda: REQUESTS)
    return tiny_backbone("llama", max_position_embeddings=512)


@pytest.fixture
def write_rows(tmp_path):
    """A function: `write_rows(name, rows)` writes JSON lines and returns the path."""

    def write(name, rows):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def options(tmp_path, write_rows):
    """Of a small run on the document with answers."""
    document = tmp_path / "document.txt"
    document.write_text(DOCUMENT, encoding="utf-8")
    return {
        "document": str(document),
        "questions": write_rows("questions.jsonl", ROWS),
        "test": write_rows("test.jsonl", TEST),
        "prefix_length": 8,
        "initialization": "words",
        "max_steps": 6,
        "warmup_steps": 1,
        "batch_size": 4,
        "save_every": 2,
        "answer_length": 8,
        "output": str(tmp_path / "run"),
    }


@pytest.fixture
def unanswered(options, write_rows):
    """The same without answers: the model writes them."""
    return {**options, "questions": write_rows("open.jsonl", ({"question": row["question"]} for row in ROWS))}
