"""A memory learns its document, and a distillation can be stopped anywhere without changing the outcome."""

import gc
import json
import tomllib
import weakref
from pathlib import Path

import pytest
import torch

import prefixtune.distillation.distill as distill_module
import prefixtune.distillation.preparation as module
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example
from prefixtune.distillation.distill import distill
from prefixtune.distillation.preparation import Preparation
from prefixtune.errors import CheckpointError, ConfigError, DataError
from prefixtune.prefix.text_format import read_text_format
from prefixtune.training.train import train
from small_document import DOCUMENT, ROWS, backbone, options, unanswered, write_rows
from zoo import store_model

__all__ = ["backbone", "options", "unanswered", "write_rows"]


class Killed(Exception):
    """Whatever ends a process."""


def quiet(backbone, **options):
    return distill(backbone=backbone, progress=False, **options)


def test_a_memory_learns_the_answers(backbone, options):
    test = {**options, "test": options["questions"], "max_steps": 60, "learning_rate": 0.2}
    (result,) = quiet(backbone, **test)
    held_out = result.report["held_out"]
    assert held_out["memory"]["loss"] < 0.3 * held_out["bare"]["loss"]
    assert held_out["memory"]["exact"] == 4
    assert held_out["bare"]["exact"] == 0
    assert held_out["also_trained_on"] == 4
    assert result.report["labels"] == "given answers"
    assert result.report["general"].keys() == {"requests", "unchanged", "kl"}
    assert json.loads((result.path.parent / "distill.json").read_text()) == result.report
    # The header asks as the training did.
    text_format = read_text_format(result.prefix.header)
    assert text_format is not None
    assert (text_format.prompt, text_format.target) == ("Question: {source}\nAnswer:", " {target}\n")
    with pytest.raises(ConfigError, match="already holds a"):
        quiet(backbone, **options)


def test_without_steps_a_memory_is_the_closed_form(backbone, options, tmp_path):
    options |= {"initialization": "text", "max_steps": 0}
    (result,) = quiet(backbone, **options)
    about = result.prefix.header["initialization"]
    assert (about["compaction"], about["questions"]) == ("match", 4)
    assert about["bias"]["of"] == sum(shape.num_kv_heads for shape in backbone.geometry["decoder"])
    assert result.report["held_out"]["memory"]["loss"] > 0
    assert type(result.prefix.header["training"]["total_steps"]) is int
    moved = Path(options["output"]).rename(tmp_path / "moved")
    (again,) = quiet(backbone, resume=True, output=str(moved))
    assert again.prefix.equal(result.prefix)


def test_a_memory_comes_near_the_model_that_sees_the_document(backbone, unanswered):
    more = {"test": unanswered["questions"], "max_steps": 60, "prefix_length": 32, "learning_rate": 0.1}
    (result,) = quiet(backbone, **{**unanswered, **more})
    held_out = result.report["held_out"]
    # The model with the document in view is the teacher.
    assert held_out["in_view"]["kl"] < 1e-3
    assert held_out["memory"]["kl"] < 0.1 * held_out["bare"]["kl"]
    assert result.report["recovered"]["kl"] > 0.9


def test_a_memory_that_starts_from_a_prefix_is_as_long(backbone, options, tmp_path):
    (first,) = quiet(backbone, **options)
    again = {name: value for name, value in options.items() if name not in ("prefix_length", "initialization")}
    again |= {"init_prefix": str(first.path), "output": str(tmp_path / "again"), "max_steps": 1}
    (second,) = quiet(backbone, **again)
    # The folder names the backbone that was given.
    assert tomllib.loads((tmp_path / "again" / "distill.toml").read_text())["backbone"] == backbone.name
    assert second.prefix.lengths == first.prefix.lengths == {"decoder": options["prefix_length"]}
    with pytest.raises(ConfigError, match="prefix to start from has length"):
        quiet(backbone, **{**again, "output": str(tmp_path / "other"), "prefix_length": options["prefix_length"] + 1})


# --- stopping and resuming -------------------------------------------------------------------------------------------


def same(one, other):
    pairs = zip(one.prefix.stored_tensors(), other.prefix.stored_tensors(), strict=True)
    assert all(torch.equal(own, wanted) for own, wanted in pairs)
    assert one.report["held_out"] == other.report["held_out"]


def test_a_killed_distillation_goes_on_to_the_same_memory(backbone, unanswered, tmp_path, monkeypatch):
    (whole,) = quiet(backbone, **{**unanswered, "output": str(tmp_path / "whole")})

    def kill(*_, **__):
        raise Killed

    def at_step_3(event):
        if event["event"] == "step" and event["step"] == 3:
            raise Killed

    phases = {"questions": (module, "write_questions"), "labels": (Preparation, "label")}
    phases["report"] = distill_module, "report"
    for where in (*phases, "training"):
        options = {**unanswered, "output": str(tmp_path / where)}
        with monkeypatch.context() as patch:
            if where in phases:
                patch.setattr(*phases[where], kill)
            with pytest.raises(Killed):
                distill(backbone=backbone, progress=False, on_event=None if where in phases else at_step_3, **options)
        with monkeypatch.context() as patch:
            if where in ("training", "report"):
                # Neither answers nor labels are computed again.
                patch.setattr(module, "label_examples", kill)
                patch.setattr(Preparation, "_make", kill)
            # The same file by another name.
            again = {"output": options["output"], "questions": f"/.{options['questions']}"}
            (resumed,) = quiet(backbone, resume=True, **again)
        same(resumed, whole)


def test_two_runs_of_one_seed_are_one(backbone, options, tmp_path):
    own = {**options, "questions": "self", "num_questions": 6, "test": "", "max_steps": 2}
    first, second = (quiet(backbone, **{**own, "output": str(tmp_path / name)})[0] for name in "ab")
    same(first, second)
    rows = [json.loads(line) for line in (first.path.parent / "questions.jsonl").read_text().splitlines()]
    questions = [" ".join(row["question"].casefold().split()) for row in rows]
    assert len(questions) == len(set(questions)) <= 6
    assert {row["kind"] for row in rows} >= {"list", "summary", "continuation"}


# --- several documents, prompts, teachers -----------------------------------------------------------------------------


def two_documents(options, write_rows, tmp_path, fox=ROWS[1::2], owl=ROWS[::2]):
    """Options of a run on a folder of two documents, each with its questions."""
    (tmp_path / "docs").mkdir()
    for name, rows in (("fox", fox), ("owl", owl)):
        (tmp_path / "docs" / f"{name}.txt").write_text(DOCUMENT)
        write_rows(f"questions/{name}.jsonl", rows)
    return {**options, "document": str(tmp_path / "docs"), "questions": str(tmp_path / "questions"), "test": ""}


def test_a_folder_gives_a_memory_per_document(backbone, options, write_rows, tmp_path):
    several = two_documents(options, write_rows, tmp_path)
    results = quiet(backbone, **{**several, "test": several["questions"]})
    assert [result.name for result in results] == ["fox", "owl"]
    alone = {
        **options,
        "questions": str(tmp_path / "questions/owl.jsonl"),
        "test": str(tmp_path / "questions/owl.jsonl"),
        "output": str(tmp_path / "alone"),
    }
    (own,) = quiet(backbone, **alone)
    for tensor, wanted in zip(results[1].prefix.stored_tensors(), own.prefix.stored_tensors(), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-3, atol=1e-3)


def test_memories_train_beside_each_other(backbone, options, write_rows, tmp_path):
    asked = [{"question": row["question"]} for row in ROWS]
    own = two_documents(options, write_rows, tmp_path, fox=asked[1::2], owl=asked[::2])
    beside = quiet(backbone, **own, beside="self")
    alone = quiet(backbone, **{**own, "output": str(tmp_path / "alone")})
    for one, other in zip(beside, alone, strict=True):
        assert one.report["labels"] == "the teacher's 20 likeliest tokens"
        assert {pair[0] for pair in one.prefix.header["questions"]} < {row["question"] for row in ROWS}
        tensors = zip(one.prefix.stored_tensors(), other.prefix.stored_tensors(), strict=True)
        assert any(not torch.allclose(tensor, wanted, atol=1e-4) for tensor, wanted in tensors)


def test_a_document_longer_than_the_window_is_read_in_pieces(tiny_backbone, options, tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("\n".join(f"The Owl {number} goes to the far town of Ashby by {number}." for number in range(20)))
    own = {**options, "document": str(path), "questions": "self", "num_questions": 10, "test": "", "max_steps": 1}
    own |= {"kinds": ("fact", "list", "continuation"), "initialization": "text", "warmup_steps": 0}
    (result,) = quiet(tiny_backbone("llama", max_position_embeddings=320), **own)
    assert result.report["pieces_in_view"] > 3
    assert result.report["held_out"]["in_view"]["kl"] < 1e-3
    rows = [json.loads(line) for line in (result.path.parent / "questions.jsonl").read_text().splitlines()]
    assert len({row["chunk"] for row in rows}) > 2
    # The start is of the whole text, too.
    assert result.prefix.header["initialization"]["tokens"] > len(path.read_text()) > 2 * 320


def test_a_prompt(backbone, options, write_rows, tmp_path):
    (tmp_path / "prompt.txt").write_text("Answer with the name of a town in the north, in small letters.")
    inputs = write_rows("inputs.jsonl", ({"question": f"Owl {number}"} for number in range(8)))
    own = {**options, "document": "", "questions": "", "prompt": str(tmp_path / "prompt.txt")}
    (result,) = quiet(backbone, **{**own, "data": inputs, "test": inputs, "max_steps": 40})
    assert result.report["subject"] == "prompt"
    assert result.report["held_out"]["memory"]["kl"] < result.report["held_out"]["bare"]["kl"]


@pytest.mark.parametrize("method", ["lora", "prefix"])
def test_the_run_of_another_method_is_a_teacher(options, write_rows, tmp_path, method):
    folder = store_model(tmp_path / "model", "llama", max_position_embeddings=512)
    examples = [Example(row["question"], (row["answer"],)) for row in ROWS]
    common = {"backbone": folder, "dtype": "float32", "max_steps": 30, "warmup_steps": 2}
    teacher = train(
        examples=examples, method=method, output=str(tmp_path / "teacher"), progress=False, learning_rate=0.02, **common
    )
    own = {**options, **common, "document": "", "questions": "", "teacher": str(teacher.path.parent)}
    inputs = write_rows("inputs.jsonl", ({"question": row["question"]} for row in ROWS))
    (result,) = distill(progress=False, **{**own, "data": inputs, "test": options["questions"], "max_steps": 40})
    held_out = result.report["held_out"]
    assert held_out["memory"]["kl"] < held_out["bare"]["kl"]
    assert held_out["teacher"]["loss"] < held_out["bare"]["loss"]
    assert load_prefix(result.path).length() == 8


def test_a_teacher_is_let_go_before_the_training(backbone, unanswered, tmp_path, monkeypatch):
    folder = store_model(tmp_path / "teacher", "llama", max_position_embeddings=512, num_hidden_layers=1)
    loaded = []
    load_teacher = module.load_teacher

    def load(*arguments):
        teacher = load_teacher(*arguments)
        loaded.append(weakref.ref(teacher.backbone.model))
        return teacher

    left = []

    def at_a_step(event):
        if event["event"] == "step":
            gc.collect()
            left.append(loaded[0]() is not None)

    monkeypatch.setattr(module, "load_teacher", load)
    own = {**unanswered, "teacher": folder, "dtype": "float32", "max_steps": 2, "warmup_steps": 0}
    (result,) = distill(backbone=backbone, progress=False, on_event=at_a_step, **own)
    assert result.report["teacher"] == f"{folder} with the document in view"
    assert (len(loaded), left) == (1, [False, False])


@pytest.mark.parametrize("answered", [False, True])
def test_neither_another_backbone_nor_another_document_is_gone_on_with(
    backbone, options, unanswered, tiny_backbone, monkeypatch, answered
):
    def kill(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        # The answers are there, and the training has not begun.
        patch.setattr(Preparation, "label", kill)
        with pytest.raises(Killed):
            quiet(backbone, **(options if answered else unanswered))
    other = tiny_backbone("llama", max_position_embeddings=512, seed=1)
    if not answered:
        with pytest.raises(CheckpointError):
            distill(output=unanswered["output"], backbone=other, resume=True, progress=False)
    # Nor does another document.
    Path(unanswered["document"]).write_text(DOCUMENT.replace("Ashby", "Selby"))
    with pytest.raises(CheckpointError):
        distill(output=unanswered["output"], backbone=backbone, resume=True, progress=False)


def test_of_two_that_begin_in_one_folder_the_second_is_refused(backbone, options, monkeypatch):
    begun = Path(options["output"]) / "distill.toml"

    def while_another_begins(*arguments):
        begun.parent.mkdir()
        begun.write_text("another")
        return Preparation(*arguments)

    monkeypatch.setattr(distill_module, "Preparation", while_another_begins)
    with pytest.raises(ConfigError, match="already holds a distillation"):
        quiet(backbone, **options)
    assert begun.read_text() == "another"


def test_nothing_is_written_where_one_of_several_documents_does_not_fit(tiny_backbone, options, write_rows, tmp_path):
    long = [{"question": "Where is it? " * 20}]
    own = two_documents(options, write_rows, tmp_path, fox=[{"question": "Where?"}], owl=long)
    with pytest.raises(DataError, match="free for a text"):
        quiet(tiny_backbone("llama", max_position_embeddings=256), **own)
    with pytest.raises(DataError):
        quiet(tiny_backbone("llama"), **options | {"sites": "decoder=400"})
    with pytest.raises(ConfigError, match="dtype is 'bfloat16'"):
        quiet(tiny_backbone("llama"), **options | {"dtype": "bfloat16"})
    assert not Path(options["output"]).exists()


def test_long_questions_and_long_answers_find_room_in_the_report(tiny_backbone, options, write_rows):
    rows = [{"question": "Where? " * 12, "answer": "east"}, {"question": "Who?", "answer": "fox " * 24}]
    own = options | {"test": write_rows("test.jsonl", rows), "max_steps": 1}
    (result,) = quiet(tiny_backbone("llama", max_position_embeddings=256), **own)
    assert "exact" in result.report["held_out"]["memory"]
