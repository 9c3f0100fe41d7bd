"""The phases of one memory: its questions with answers, the teacher's labels, and the report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.documents import Question, chunk_of_question, split_document
from prefixtune.distillation.inputs import Job, read_prepared, with_answers, write_prepared
from prefixtune.distillation.questioning import answer_questions, make_questions
from prefixtune.distillation.report import (
    Reading,
    closing_tokens,
    encode_questions,
    read_test,
    recovered_share,
    text_bytes,
)
from prefixtune.distillation.teacher import (
    LABELS_FILE,
    TEST_LABELS_FILE,
    Teacher,
    label_examples,
    store_labels,
    stored_labels,
    with_labels,
)
from prefixtune.distillation.wording import Wording, in_view
from prefixtune.errors import DataError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.config import TrainConfig
from prefixtune.training.data import TrainData
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

__all__ = ["Lesson", "label_data", "prepare", "report"]

TEACHER_FILE, START_FILE = "teacher.json", "start.txt"
"""In a run's folder: how well the teacher reads; what the start of a document that is too long is made from."""
_HELD_OUT = 10
"""Every tenth question that is made here is held out for the report."""
_MOST_BYTES = 4 * 2**30
"""Of the keys and values of a document, which are all in memory while questions are answered."""
_UNBOUNDED = 4096
"""Tokens of a text in view, for a model of any number of positions."""


@dataclass(frozen=True)
class Lesson:
    """A memory that is ready to be trained.

    Attributes:
        job: What it is made of.
        run: Its training.
        wording: The text around questions and answers.
        soft: The teacher's likeliest tokens are the labels; else the answers are.
        chunks: The text in pieces that the teacher has in view; empty: there is no text.
        questions: To train on, each with an answer.
        test: Held out; answers are the given ones.
        taught: Held out, with the teacher's answers; empty where the answers are the labels.
        seconds: What each phase took.
    """

    job: Job
    run: TrainConfig
    wording: Wording
    soft: bool
    chunks: tuple[str, ...]
    questions: tuple[Question, ...]
    test: tuple[Question, ...]
    taught: tuple[Question, ...]
    seconds: dict[str, float] = field(default_factory=dict)


class _Views:
    """The pieces of a text in a teacher's view, computed when they are asked for."""

    def __init__(self, teacher: Teacher, wording: Wording, chunks: Sequence[str]) -> None:
        self._teacher, self._wording, self._chunks = teacher, wording, chunks

    @cached_property
    def pieces(self) -> list[Prefix]:
        """One per piece of the text."""
        return [in_view(self._teacher.backbone, self._wording, chunk) for chunk in self._chunks]

    def of(self, questions: Sequence[Question]) -> list[Prefix | None]:
        """What stands before each question."""
        if not self._chunks:
            return [self._teacher.prefix] * len(questions)
        return [self.pieces[question.chunk] for question in questions]


def prepare(
    config: DistillConfig,
    job: Job,
    student: Backbone,
    load: Callable[[], Teacher],
    wording: Wording,
    console: Console,
) -> Lesson:
    """Make what is missing of a memory's questions and answers, and keep them in its folder.

    Args:
        config: The options.
        job: The memory.
        student: The backbone.
        load: Loads the teacher.
        wording: The text around questions and answers.
        console: Shows the progress.

    Raises:
        DataError: No question could be made, or the teacher answers none.
    """
    soft = config.subject != "document" or not job.answered
    chunks = split_document(student, job.text, _chunk_length(config, job, student, wording)) if job.text else []
    run = config.run_config(
        str(job.output),
        text_file=_start_file(config, job, student, chunks),
        prompt_format=wording.prompt,
        target_format=wording.target,
    )
    test = _with_chunks(job.test, chunks)
    if not soft:
        return Lesson(job, run, wording, False, tuple(chunks), job.questions, tuple(test), ())
    seconds: dict[str, float] = {}
    prepared = read_prepared(job)
    if prepared is None:
        teacher = load()
        views = _Views(teacher, wording, chunks)
        questions, taught = _make(config, job, teacher, views, wording, chunks, test, seconds, console)
        _keep_reading(job, teacher, student, views, wording, test, config, console)
        write_prepared(job, questions, taught)
    else:
        questions, taught = prepared
    return Lesson(job, run, wording, True, tuple(chunks), tuple(questions), tuple(test), tuple(taught), seconds)


def _chunk_length(config: DistillConfig, job: Job, student: Backbone, wording: Wording) -> int:
    """Tokens of the text that fit into the view with a question and its answer.

    Raises:
        DataError: Nothing fits.
    """
    positions = student.max_positions or _UNBOUNDED
    around = len(student.encode(wording.view(student, ""))) + len(student.encode(wording.prompt)) + 8
    known = [*job.questions, *job.test]
    longest = max((len(student.encode(f"{item.question} {item.answer or ''}")) for item in known), default=64)
    room = positions - around - max(longest, 64) - config.answer_length
    if room < 16:
        raise DataError(
            f"the {positions} positions of {student.name!r} have no room for a text, its longest question and an "
            f"answer of {config.answer_length} tokens.",
            hint="lower --answer-length, or shorten the questions.",
        )
    if config.subject == "prompt" and len(student.encode(job.text)) > room:
        raise DataError(
            f"the prompt {job.text_file!r} has {len(student.encode(job.text)):,} tokens, but {room:,} are free beside "
            "an input and its answer.",
            hint="shorten it, or lower --answer-length.",
        )
    size = text_bytes(student, len(student.encode(job.text)), 4)
    if size > _MOST_BYTES:
        raise DataError(
            f"the keys and values of {job.text_file!r} take {size / 2**30:.0f} GB, but at most {_MOST_BYTES >> 30} GB "
            "are allowed.",
            hint="divide it: a folder of documents gives a memory of each.",
        )
    return min(config.chunk_length or room, room) if config.subject == "document" else room


def _start_file(config: DistillConfig, job: Job, student: Backbone, chunks: Sequence[str]) -> str:
    """The file of the text to start from: of a document that is longer than the window, an excerpt of every piece."""
    positions = student.max_positions
    if config.initialization != "text" or positions is None or len(student.encode(job.text)) <= positions:
        return job.text_file
    share = max(positions // len(chunks) - 2, 1)
    excerpt = [split_document(student, chunk, share)[0] for chunk in chunks]
    path = job.output / START_FILE
    write_text(path, "\n".join(excerpt))
    return str(path)


def _with_chunks(questions: Sequence[Question], chunks: Sequence[str]) -> list[Question]:
    """The questions with the piece of the text that each is about."""
    if len(chunks) < 2:
        return list(questions)
    numbers = chunk_of_question(chunks, [question.question for question in questions])
    return [
        Question(question.question, question.answer, number, question.kind)
        for question, number in zip(questions, numbers, strict=True)
    ]


def _make(
    config: DistillConfig,
    job: Job,
    teacher: Teacher,
    views: _Views,
    wording: Wording,
    chunks: Sequence[str],
    test: Sequence[Question],
    seconds: dict[str, float],
    console: Console,
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and held-out ones, all with answers: given ones, or the teacher's."""
    name = f" of {job.name}" if job.name else ""
    if config.questions == SELF:
        started = time.monotonic()
        with console.progress(f"questions{name}", config.num_questions) as bar:
            questions = make_questions(
                teacher,
                chunks,
                views.pieces,
                count=config.num_questions,
                kinds=config.kinds,
                seed=config.seed,
                batch_size=config.batch_size,
                on_batch=bar.update,
            )
        seconds["questions"] = time.monotonic() - started
    else:
        questions = _with_chunks(job.questions, chunks)
    held_out = [Question(question.question, None, question.chunk, question.kind) for question in test]
    if not test and config.questions == SELF and len(questions) >= _HELD_OUT:
        held_out = questions[::_HELD_OUT]
        questions = [question for index, question in enumerate(questions) if index % _HELD_OUT]
    started = time.monotonic()
    asked = [*questions, *held_out]
    missing = [question for question in asked if question.answer is None]
    with console.progress(f"answers{name}", len(missing)) as bar:
        texts = [question.question for question in missing]
        answers = answer_questions(
            teacher,
            texts,
            views.of(missing),
            wording,
            answer_length=config.answer_length,
            batch_size=config.batch_size,
            on_batch=bar.update,
        )
    seconds["answers"] = time.monotonic() - started
    written = iter(answers)
    complete = [question.answer if question.answer is not None else next(written) for question in asked]
    made = with_answers(questions, complete[: len(questions)])
    if not made:
        raise DataError(
            f"the teacher {teacher.name!r} answers none of the {len(questions)} questions{name} with a word.",
            hint="give answers with the questions, another --teacher, or --ask chat.",
        )
    if len(made) < len(questions):
        console.info(f"{len(questions) - len(made)} of {len(questions)} questions{name} got no answer and are left out")
    return made, with_answers(held_out, complete[len(questions) :])


def _keep_reading(
    job: Job,
    teacher: Teacher,
    student: Backbone,
    views: _Views,
    wording: Wording,
    test: Sequence[Question],
    config: DistillConfig,
    console: Console,
) -> None:
    """How well another teacher than the student reads: measured while it is loaded, and kept."""
    if teacher.backbone is student and teacher.prefix is None:
        return
    with console.progress("the teacher's answers", len(test)) as bar:
        reading = read_test(
            teacher, test, [], views.of(test), [], wording, batch_size=config.batch_size, on_batch=bar.update
        )
    write_text(job.output / TEACHER_FILE, json.dumps({"name": teacher.name, **reading.to_dict()}) + "\n")


# --- labels ----------------------------------------------------------------------------------------------------------


def label_data(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    load: Callable[[], Teacher],
    data: TrainData,
    console: Console,
) -> TrainData:
    """A run's data with the teacher's labels, computed once and kept; as it is where the answers are the labels."""
    if not lesson.soft:
        return data
    started = time.monotonic()
    folder = lesson.job.output
    train = stored_labels(folder / LABELS_FILE, data.digest, data.train.examples)
    if train is None:
        teacher = load()
        taught = encode_questions(student, lesson.taught, lesson.wording, config.prefix_length) if lesson.taught else []
        views = _Views(teacher, lesson.wording, lesson.chunks)
        train, held_out = _label(config, lesson, student, teacher, views, data.train.examples, taught, console)
        if held_out:
            store_labels(folder / TEST_LABELS_FILE, held_out, data.digest, teacher.name)
        store_labels(folder / LABELS_FILE, train, data.digest, teacher.name)
    lesson.seconds["labels"] = time.monotonic() - started
    return with_labels(data, train)


def _label(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    teacher: Teacher,
    views: _Views,
    train: Sequence[TokenizedExample],
    held_out: Sequence[TokenizedExample],
    console: Console,
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """The training examples and the held-out ones with the teacher's labels."""
    closing = 0 if lesson.wording.tuned else closing_tokens(student, lesson.wording)
    vocabulary = int(student.model.get_output_embeddings().weight.shape[0])
    with console.progress("the teacher's labels", len(train) + len(held_out)) as bar:
        labelled = label_examples(
            teacher,
            [*train, *held_out],
            [*views.of(lesson.questions), *views.of(lesson.taught)],
            vocabulary=vocabulary,
            closing=closing,
            batch_size=config.batch_size,
            on_batch=bar.update,
        )
    return labelled[: len(train)], labelled[len(train) :]


# --- the report ------------------------------------------------------------------------------------------------------


def report(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    memory: Prefix,
    path: Path,
    console: Console,
    *,
    training_seconds: float,
) -> dict[str, Any]:
    """What a memory knows, as JSON."""
    started = time.monotonic()
    readings = _readings(config, lesson, student, memory, console)
    bare, seen, own = readings.get("bare"), readings.get("in_view"), readings.get("memory")
    seconds = {**lesson.seconds, "training": training_seconds, "report": time.monotonic() - started}
    figures: dict[str, Any] = {
        "subject": config.subject,
        **({"name": lesson.job.name} if lesson.job.name else {}),
        "teacher": _teacher_name(config, lesson, student),
        "labels": "the teacher's 20 likeliest tokens" if lesson.soft else "given answers",
        "questions": len(lesson.questions),
        "held_out": {
            "questions": len(lesson.test),
            "teacher_answers": len(lesson.taught),
            **{name: reading.to_dict() for name, reading in readings.items()},
        },
        "memory": str(path),
        "positions": memory.length(),
        "bytes": path.stat().st_size,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if lesson.job.text:
        tokens = len(student.encode(lesson.job.text))
        size = 4 if config.save_dtype == "float32" else 2
        figures |= {
            "text_positions": tokens,
            "text_bytes": text_bytes(student, tokens, size),
            "pieces_in_view": len(lesson.chunks),
        }
    if bare is not None and own is not None:
        shares = {
            "loss": recovered_share(bare.loss, None if seen is None else seen.loss, own.loss),
            "kl": recovered_share(bare.divergence, 0.0, own.divergence),
        }
        figures["recovered"] = {name: round(share, 4) for name, share in shares.items() if share is not None}
    return figures


def _teacher_name(config: DistillConfig, lesson: Lesson, student: Backbone) -> str:
    if not lesson.soft:
        return "the given answers"
    view = f" with the {config.subject} in view" if lesson.job.text else ""
    return f"{config.teacher or student.name}{view}"


def _readings(
    config: DistillConfig, lesson: Lesson, student: Backbone, memory: Prefix, console: Console
) -> dict[str, Reading]:
    """How well the bare model, the model with the text in view, the teacher and the memory do."""
    taught: list[TokenizedExample] = []
    if lesson.taught:
        encoded = encode_questions(student, lesson.taught, lesson.wording, config.prefix_length)
        taught = stored_labels(lesson.job.output / TEST_LABELS_FILE, None, encoded) or []
    if not (lesson.test or taught):
        return {}
    own = Teacher(student, student.name)
    views = _Views(own, lesson.wording, lesson.chunks)
    readers: dict[str, tuple[list[Prefix | None], list[Prefix | None]]] = {
        "bare": ([None] * len(lesson.test), [None] * len(taught)),
        **({"in_view": (views.of(lesson.test), views.of(lesson.taught))} if lesson.chunks else {}),
        "memory": ([memory] * len(lesson.test), [memory] * len(taught)),
    }
    readings: dict[str, Reading] = {}
    with console.progress("report", len(readers) * len(lesson.test)) as bar:
        for number, (name, (test_views, taught_views)) in enumerate(readers.items()):
            offset = number * len(lesson.test)
            readings[name] = read_test(
                own,
                lesson.test,
                taught,
                test_views,
                taught_views,
                lesson.wording,
                batch_size=config.batch_size,
                on_batch=lambda done, offset=offset: bar.update(offset + done),  # type: ignore[misc]
            )
    stored = lesson.job.output / TEACHER_FILE
    if stored.exists():
        kept = json.loads(stored.read_text(encoding="utf-8"))
        readings["teacher"] = Reading(kept.get("loss"), kept.get("exact"))
    return readings
