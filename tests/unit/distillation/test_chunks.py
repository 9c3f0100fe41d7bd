"""Documents in pieces, which piece a question is about, and what fits beside a text."""

from pathlib import Path

import pytest

import prefixtune.distillation.memory as module
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import Job, Question
from prefixtune.distillation.memory import chunk_length, split_document, with_chunks
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError

TEXT = "One owl flies. Two foxes run far.\nThree trains leave at noon, and four stay here all day long.\n"
WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")
CONFIG = DistillConfig(document="doc.txt", questions="q.jsonl")


def job(*questions, test=()):
    return Job("", Path("run"), "doc.txt", TEXT * 5, questions, test)


@pytest.mark.parametrize("length", [5, 40, 200])
def test_pieces_are_the_whole_document_and_none_is_too_long(backbone, length):
    chunks = split_document(backbone, TEXT, length)
    assert "".join("".join(chunks).split()) == "".join(TEXT.split())
    assert all(len(backbone.encode(chunk)) <= length for chunk in chunks)
    assert (len(chunks) == 1) == (length == 200)
    if length == 40:
        assert chunks[0] == "One owl flies. Two foxes run far."


def test_a_question_belongs_to_the_piece_with_its_rare_words():
    chunks = ["the owl of the north", "the fox of the south", "the train of the east"]
    asked = [Question(text) for text in ("the Fox?", "the train to the east", "zzz")]
    assert [question.chunk for question in with_chunks(asked, chunks)] == [1, 2, 0]


def test_a_piece_fits_the_teacher_and_the_student(tiny_backbone):
    small = tiny_backbone("llama", max_position_embeddings=256)
    large = tiny_backbone("llama", max_position_embeddings=512)
    asked = job(Question("Where?"))
    wanted = chunk_length(CONFIG, asked, [small], WORDING)
    assert chunk_length(CONFIG, asked, [large], WORDING) == wanted + 256
    assert chunk_length(CONFIG, asked, [small, large], WORDING) == wanted


def test_keys_and_values_count_where_they_are_held(tiny_backbone, monkeypatch):
    student = tiny_backbone("llama", max_position_embeddings=512)
    deep = tiny_backbone("llama", max_position_embeddings=512, num_hidden_layers=6)
    # 2 KV heads x 8 numbers, keys and values, 3 layers, 4 bytes each.
    monkeypatch.setattr(module, "_MOST_BYTES", 5 * len(TEXT) * 2 * 8 * 2 * 3 * 4)
    asked = Question("Where?")
    assert chunk_length(CONFIG, job(asked), [student], WORDING)
    with pytest.raises(DataError):
        chunk_length(CONFIG, job(asked), [student, deep], WORDING)
    monkeypatch.setattr(module, "_MOST_BYTES", 1)
    given = Question("Where?", "Ashby")
    assert chunk_length(CONFIG, job(given), [student], WORDING)
    with pytest.raises(DataError):
        chunk_length(CONFIG, job(given, test=(given,)), [student], WORDING)
