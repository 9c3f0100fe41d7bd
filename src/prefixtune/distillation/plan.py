"""What is to be made of a job: checked for every job before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.documents import Question, chunk_of_question, split_document
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.room import START_FILE, chunk_length, sliding_window, start_excerpt
from prefixtune.distillation.wording import Wording
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

__all__ = ["Plan", "make_plan", "with_chunks"]


@dataclass(frozen=True)
class Plan:
    """A job whose text fits.

    Attributes:
        job: The memory.
        run: Its training.
        soft: The teacher's likeliest tokens are the labels; else the answers are.
        chunks: The text in pieces that the teacher has in view; empty: there is no text.
        excerpt: What the memory starts from, where the text itself is too long for that; empty: the text.
        test: The held-out questions with their pieces.
    """

    job: Job
    run: TrainConfig
    soft: bool
    chunks: tuple[str, ...]
    excerpt: str
    test: tuple[Question, ...]


def make_plan(config: DistillConfig, job: Job, readers: Sequence[Backbone], wording: Wording, console: Console) -> Plan:
    """Check that a job's text fits, and cut it into pieces.

    Args:
        config: The options.
        job: The memory.
        readers: Who has the text in view: the student, and a teacher of its own with the same tokenizer.
        wording: The text around questions and answers.
        console: Shows warnings.

    Raises:
        DataError: The text does not fit.
    """
    student = readers[0]
    chunks = split_document(student, job.text, chunk_length(config, job, readers, wording)) if job.text else []
    excerpt = start_excerpt(config, job, student, chunks)
    run = config.run_config(
        str(job.output),
        text_file=str(job.output / START_FILE) if excerpt else job.text_file,
        prompt_format=wording.prompt,
        target_format=wording.target,
    )
    for reader in readers:
        _warn_of_windows(job, reader, chunks, console)
    soft = config.subject != "document" or not job.answered
    return Plan(job, run, soft, tuple(chunks), excerpt, tuple(with_chunks(job.test, chunks)))


def _warn_of_windows(job: Job, reader: Backbone, chunks: Sequence[str], console: Console) -> None:
    """Say where a text in view is not what the model would make of it."""
    window = sliding_window(reader)
    longest = max((len(reader.encode(chunk)) for chunk in chunks), default=0)
    if window is not None and longest > window:
        console.info(
            f"some layers of {reader.name} see {window:,} tokens back, but {longest:,} of {job.text_file} are in view: "
            "as a prefix all of them stay visible, which is not what the model makes of the text itself"
        )


def with_chunks(questions: Sequence[Question], chunks: Sequence[str]) -> list[Question]:
    """The questions with the piece of the text that each is about."""
    if len(chunks) < 2:
        return list(questions)
    numbers = chunk_of_question(chunks, [question.question for question in questions])
    return [replace(question, chunk=number) for question, number in zip(questions, numbers, strict=True)]
