"""The phases of one memory before its training: questions with answers, and the teacher's labels."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import KINDS, SELF, DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.lesson import TEACHER_FILE, Lesson, Views
from prefixtune.distillation.plan import Plan, with_chunks
from prefixtune.distillation.questioning import answer_questions, hold_out, make_questions
from prefixtune.distillation.report import cut_unended, encode_taught, num_asked, read_test, target_endings
from prefixtune.distillation.room import START_FILE
from prefixtune.distillation.stored import (
    check_sources,
    read_prepared,
    read_seconds,
    with_answers,
    write_prepared,
    write_seconds,
    write_sources,
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
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError
from prefixtune.training.data import TrainData
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

__all__ = ["label_data", "prepare"]


def prepare(
    config: DistillConfig,
    plan: Plan,
    student: Backbone,
    load: Callable[[], Teacher],
    wording: Wording,
    console: Console,
) -> Lesson:
    """Make what is missing of a memory's questions and answers, and keep them in its folder.

    Args:
        config: The options.
        plan: The memory.
        student: The backbone.
        load: Loads the teacher.
        wording: The text around questions and answers.
        console: Shows the progress.

    Raises:
        CheckpointError: The folder's distillation was begun with something else, or a file of it is damaged.
        DataError: No question could be made, or the teacher answers none.
    """
    job = plan.job
    check_sources(config, job, student)
    write_sources(config, job, student)
    if plan.excerpt:
        write_text(job.output / START_FILE, plan.excerpt)
    seconds = read_seconds(job)
    if not plan.soft:
        questions = with_chunks(job.questions, plan.chunks)
        return Lesson(job, plan.run, wording, False, plan.chunks, tuple(questions), plan.test, (), seconds)
    prepared = read_prepared(job, len(plan.chunks))
    if prepared is None:
        teacher = load()
        views = Views(teacher, wording, plan.chunks)
        prepared = _make(config, plan, teacher, views, wording, seconds, console)
        _keep_reading(plan, teacher, student, views, wording, config, console)
        write_seconds(job, seconds)
        write_prepared(job, *prepared)
    questions, taught = prepared
    return Lesson(job, plan.run, wording, True, plan.chunks, tuple(questions), plan.test, tuple(taught), seconds)


def _make(
    config: DistillConfig,
    plan: Plan,
    teacher: Teacher,
    views: Views,
    wording: Wording,
    seconds: dict[str, float],
    console: Console,
) -> tuple[list[Question], list[Question]]:
    """Questions to train on and held-out ones, all with answers: given ones, or the teacher's."""
    job, chunks, test = plan.job, plan.chunks, plan.test
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
        if len(questions) < config.num_questions:
            counts = Counter(question.kind for question in questions)
            console.info(
                f"{len(questions)} of {config.num_questions} questions{name} were made "
                f"({', '.join(f'{kind} {counts[kind]}' for kind in KINDS if kind in config.kinds)})"
            )
        seconds["questions"] = seconds.get("questions", 0.0) + time.monotonic() - started
    else:
        questions = with_chunks(job.questions, chunks)
    # One that has several answers is there with each; the teacher is asked once.
    held_out = list(
        dict.fromkeys(Question(question.question, None, question.chunk, question.kind) for question in test)
    )
    if not test and config.questions == SELF:
        questions, held_out = hold_out(questions, config.seed)
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
    seconds["answers"] = seconds.get("answers", 0.0) + time.monotonic() - started
    written = iter(answers)
    complete = [(question.answer, True) if question.answer is not None else next(written) for question in asked]
    made = with_answers(questions, complete[: len(questions)])
    if not made:
        raise DataError(
            f"the teacher {teacher.name!r} answers none of the {len(questions)} questions{name} with a word.",
            hint="give answers with the questions, another --teacher, or --ask chat.",
        )
    if len(made) < len(questions):
        console.info(f"{len(questions) - len(made)} of {len(questions)} questions{name} got no answer and are left out")
    cut = sum(not question.ended for question in made)
    if cut:
        console.info(
            f"{cut} of {len(made)} answers{name} are cut at {config.answer_length} tokens (--answer-length), and teach "
            "no end"
        )
    return made, with_answers(held_out, complete[len(questions) :])


def _keep_reading(
    plan: Plan,
    teacher: Teacher,
    student: Backbone,
    views: Views,
    wording: Wording,
    config: DistillConfig,
    console: Console,
) -> None:
    """How well another teacher than the student reads: measured while it is loaded, and kept."""
    if teacher.backbone is student and teacher.prefix is None:
        return
    test = plan.test
    with console.progress("the teacher's answers", num_asked(test)) as bar:
        reading = read_test(
            teacher, test, [], views.of(test), [], wording, batch_size=config.batch_size, on_batch=bar.update
        )
    write_text(plan.job.output / TEACHER_FILE, json.dumps({"name": teacher.name, **reading.to_dict()}) + "\n")


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
    vocabulary = int(student.model.get_output_embeddings().weight.shape[0])
    examples = cut_unended(student, data.train.examples, lesson.questions, lesson.wording)
    train = stored_labels(folder / LABELS_FILE, data.digest, examples, vocabulary)
    if train is None:
        teacher = load()
        taught = encode_taught(student, lesson.taught, lesson.wording, config.prefix_length)
        train, held_out = _label(config, lesson, student, teacher, examples, taught, vocabulary, console)
        if held_out:
            store_labels(folder / TEST_LABELS_FILE, held_out, data.digest, teacher.name)
        store_labels(folder / LABELS_FILE, train, data.digest, teacher.name)
    lesson.seconds["labels"] = lesson.seconds.get("labels", 0.0) + time.monotonic() - started
    return with_labels(data, train)


def _label(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    teacher: Teacher,
    train: Sequence[TokenizedExample],
    held_out: Sequence[TokenizedExample],
    vocabulary: int,
    console: Console,
) -> tuple[list[TokenizedExample], list[TokenizedExample]]:
    """The training examples and the held-out ones with the teacher's labels."""
    views = Views(teacher, lesson.wording, lesson.chunks)
    questions = [*lesson.questions, *lesson.taught]
    # A teacher that was trained with this wording says itself where an answer ends.
    closing = [0] * len(questions) if lesson.wording.tuned else target_endings(student, questions, lesson.wording)
    with console.progress("the teacher's labels", len(questions)) as bar:
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
