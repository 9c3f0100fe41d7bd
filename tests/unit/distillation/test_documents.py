"""Documents in pieces, and questions from files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.documents import (
    chunk_of_question,
    find_documents,
    questions_file,
    read_document,
    read_questions,
    split_document,
)
from prefixtune.errors import DataError

TEXT = "One owl flies. Two foxes run far.\nThree trains leave at noon, and four stay here all day long.\n"


@pytest.mark.parametrize("length", [5, 16, 40, 200])
def test_pieces_are_the_whole_document_and_none_is_too_long(backbone: Backbone, length: int) -> None:
    chunks = split_document(backbone, TEXT, length)
    assert "".join("".join(chunks).split()) == "".join(TEXT.split())
    assert all(len(backbone.encode(chunk)) <= length for chunk in chunks)
    assert (len(chunks) == 1) == (length == 200)


def test_pieces_end_with_sentences_where_they_fit(backbone: Backbone) -> None:
    chunks = split_document(backbone, TEXT, 40)
    assert chunks[0] == "One owl flies. Two foxes run far."


def test_a_question_belongs_to_the_piece_with_its_rare_words() -> None:
    chunks = ["the owl of the north", "the fox of the south", "the train of the east"]
    assert chunk_of_question(chunks, ["the Fox?", "the train to the east", "zzz"]) == [1, 2, 0]


def test_a_folder_has_its_text_files_in_order(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "notes.pdf"):
        (tmp_path / name).write_text("text")
    assert [path.name for path in find_documents(str(tmp_path))] == ["a.txt", "b.md"]


@pytest.mark.parametrize(
    ("names", "why"), [([], "has no document"), (["a.txt", "a.md"], "two documents of the name 'a'")]
)
def test_wrong_folders(tmp_path: Path, names: list[str], why: str) -> None:
    for name in names:
        (tmp_path / name).write_text("text")
    with pytest.raises(DataError, match=why):
        find_documents(str(tmp_path))


@pytest.mark.parametrize(("content", "why"), [(b"  \n", "is empty"), (b"a\0b", "byte 0x00"), (b"\xff\xfe\xfa", "UTF-")])
def test_documents_that_are_no_text(tmp_path: Path, content: bytes, why: str) -> None:
    (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(DataError, match=why):
        read_document(tmp_path / "a.txt")


def test_questions_of_each_document(tmp_path: Path) -> None:
    (tmp_path / "owl.csv").write_text("question,answer\nWho?,Mira\n")
    assert questions_file(str(tmp_path), Path("docs/owl.txt"), several=True).name == "owl.csv"
    with pytest.raises(DataError, match=r"no questions of 'fox.txt'"):
        questions_file(str(tmp_path), Path("docs/fox.txt"), several=True)
    with pytest.raises(DataError, match="several documents"):
        questions_file(str(tmp_path / "owl.csv"), Path("docs/fox.txt"), several=True)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        (
            [{"question": "Who?", "answer": "Mira"}, {"question": "When?"}],
            r"line 2 has no answer, but .*line 1 has one",
        ),
        ([{"question": "Who?"}, {"question": "When?", "answer": "8"}], r"line 2 has an answer, but .*line 1 has none"),
        ([{"text": "Who?"}], r"'question' is missing; the columns are 'text'"),
        ([{"question": ["Who?"]}], r"'question' is .*, not a text"),
    ],
)
def test_wrong_questions(write_rows: Callable[..., str], rows: list[dict[str, Any]], why: str) -> None:
    with pytest.raises(DataError, match=why):
        read_questions(Path(write_rows("q.jsonl", rows)))


def test_each_of_several_answers_is_learned(write_rows: Callable[..., str]) -> None:
    rows = [
        {"question": "Where?", "answers": ["Ashby", "In Ashby"]},
        {"question": "When?", "answers": "8"},
        {"question": "Who?", "answer": ["Mira"]},
        {"question": "Why?", "answer": None, "answers": ["Rain."]},
    ]
    found = [(one.question, one.answer) for one in read_questions(Path(write_rows("q.jsonl", rows)))]
    assert found == [("Where?", "Ashby"), ("Where?", "In Ashby"), ("When?", "8"), ("Who?", "Mira"), ("Why?", "Rain.")]
    with pytest.raises(DataError, match=r"'answers' is .*, not a text"):
        read_questions(Path(write_rows("q.jsonl", [{"question": "Where?", "answers": [["Ashby"]]}])))


def test_numbers_are_answers(write_rows: Callable[..., str]) -> None:
    (question,) = read_questions(Path(write_rows("q.jsonl", [{"question": "How many?", "answer": 24}])))
    assert question.answer == "24"
