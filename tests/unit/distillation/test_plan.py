"""What fits beside a text: the smaller of two windows, and the memory that keys and values take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import prefixtune.distillation.plan as module
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.plan import chunk_length, sliding_window
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError

WORDING = Wording("Question: {source}\nAnswer:", " {target}\n")
CONFIG = DistillConfig(document="doc.txt", questions="q.jsonl")
TEXT = "The Owl goes to Ashby. " * 20


def job(*questions: Question, test: tuple[Question, ...] = ()) -> Job:
    return Job("", Path("run"), "doc.txt", TEXT, questions, test)


def test_a_piece_fits_the_teacher_and_the_student(tiny_backbone: Callable[..., Any]) -> None:
    small = tiny_backbone("llama", max_position_embeddings=256)
    large = tiny_backbone("llama", max_position_embeddings=512)
    asked = job(Question("Where?"))
    wanted = chunk_length(CONFIG, asked, [small], WORDING)
    assert chunk_length(CONFIG, asked, [large], WORDING) == wanted + 256
    assert chunk_length(CONFIG, asked, [large, small], WORDING) == wanted
    assert chunk_length(CONFIG, asked, [small, large], WORDING) == wanted


def test_keys_and_values_count_where_they_are_held(
    tiny_backbone: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = tiny_backbone("llama", max_position_embeddings=512)
    deep = tiny_backbone("llama", max_position_embeddings=512, num_hidden_layers=6)
    # 2 KV heads x 8 numbers, keys and values, 3 layers, 4 bytes each.
    monkeypatch.setattr(module, "_MOST_BYTES", len(TEXT) * 2 * 8 * 2 * 3 * 4)
    asked = Question("Where?")
    assert chunk_length(CONFIG, job(asked), [student], WORDING)
    with pytest.raises(DataError, match=r"the keys and values of 'doc.txt' take"):
        chunk_length(CONFIG, job(asked), [student, deep], WORDING)
    monkeypatch.setattr(module, "_MOST_BYTES", 1)
    given = Question("Where?", "Ashby")
    assert chunk_length(CONFIG, job(given), [student], WORDING)
    with pytest.raises(DataError, match="the keys and values of"):
        chunk_length(CONFIG, job(given, test=(given,)), [student], WORDING)


def test_the_shortest_window_counts(tiny_backbone: Callable[..., Any]) -> None:
    assert sliding_window(tiny_backbone("llama")) is None
    assert sliding_window(tiny_backbone("mistral", sliding_window=32)) == 32
