"""What a run's folder keeps, and what it was made from; documents in pieces, and which piece a question is about."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import Job, Question
from prefixtune.distillation.memory import chunk_length, split_document, with_chunks
from prefixtune.distillation.preparation import read_questions, sources_of, stage, write_questions
from prefixtune.distillation.wording import Wording
from prefixtune.errors import CheckpointError


def test_a_stage_is_made_once_and_not_from_anything_else(tmp_path):
    path, made = tmp_path / "a" / "file.txt", list[str]()

    def make(temporary):
        made.append("")
        temporary.write_text("made")

    keys = [stage(path, {"seed": 1}, make), stage(path, {"seed": 1}, make)]
    assert (keys[0], len(made), path.read_text()) == (keys[1], 1, "made")
    with pytest.raises(CheckpointError):
        stage(path, {"seed": 2}, make)
    # A kill came between the two files.
    path.unlink()
    assert (stage(path, {"seed": 2}, make) != keys[0], len(made)) == (True, 2)
    next(path.parent.glob("*.made_from")).unlink()
    with pytest.raises(CheckpointError):
        stage(path, {"seed": 2}, make)


def test_questions_come_back_whatever_ends_a_line(tmp_path):
    questions = [Question(f"Where{mark} is\n it?", f"a{mark}", 1, "fact", "It is.", False) for mark in "\u2028\x85\x0c"]
    write_questions(tmp_path / "q.jsonl", questions, questions[:1])
    assert read_questions(tmp_path / "q.jsonl") == (questions, questions[:1])


@pytest.mark.parametrize("damaged", ['{"question": "Where?"}\n', "no json\n"])
def test_damaged_questions_are_refused(tmp_path, damaged):
    (tmp_path / "q.jsonl").write_text(damaged)
    with pytest.raises(CheckpointError):
        read_questions(tmp_path / "q.jsonl")


def test_texts_questions_teachers_and_backbones_are_told_apart(backbone, tiny_backbone, tmp_path):
    config = DistillConfig(document="doc.txt", questions="q.jsonl", teacher="one")
    trained, weights = config.replace(teacher=str(tmp_path)), tmp_path / "weights.safetensors"
    job = Job("", Path("run"), "doc.txt", "The Owl.", (Question("Where?"),), ())
    rounded = Backbone.from_model(copy.deepcopy(backbone.model).bfloat16(), backbone.tokenizer, backbone.name)
    made = [
        sources_of(config, job, backbone),
        sources_of(config, replace(job, text="The Fox."), backbone),
        sources_of(config, replace(job, questions=(Question("Who?"),)), backbone),
        sources_of(config, replace(job, questions=(), test=job.questions), backbone),
        sources_of(config.replace(teacher="other"), job, backbone),
        sources_of(config.replace(answer_length=9), job, backbone),
        sources_of(config, job, tiny_backbone("llama", max_position_embeddings=512, seed=1)),
        sources_of(config, job, rounded),
        *(sources_of(trained, job, backbone) for some in (b"1", b"2") if weights.write_bytes(some)),
    ]
    assert len(set(map(json.dumps, made))) == len(made)
    assert sources_of(config.replace(max_steps=7), job, backbone) == made[0]


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
