"""The report on a memory: what it knows beside the bare model and the text in view, its bytes, and the times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.phases import Lesson, Views
from prefixtune.distillation.report import Reading, encode_taught, num_asked, read_test, recovered_share, text_bytes
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import Wording
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.folder import Event
from prefixtune.utils.console import Console

__all__ = ["describe", "report", "training_seconds"]


def report(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    memory: Prefix,
    path: Path,
    console: Console,
) -> dict[str, Any]:
    """What a memory knows, as JSON."""
    started = time.monotonic()
    readings = _readings(config, lesson, student, memory, console)
    bare, seen, own = readings.get("bare"), readings.get("in_view"), readings.get("memory")
    seconds = {**lesson.seconds, "report": time.monotonic() - started}
    figures = describe(config, lesson, student, memory, path, seconds)
    figures["held_out"] |= {name: reading.to_dict() for name, reading in readings.items()}
    if lesson.reading:
        figures["held_out"]["teacher"] = dict(lesson.reading)
    if bare is not None and own is not None:
        shares = {
            "loss": recovered_share(bare.loss, None if seen is None else seen.loss, own.loss),
            "kl": recovered_share(bare.divergence, 0.0, own.divergence),
        }
        figures["recovered"] = {name: round(share, 4) for name, share in shares.items() if share is not None}
    return figures


def training_seconds(events: Sequence[Event]) -> float:
    """What the steps of a run took, by its log."""
    return float(sum(event["seconds"] for event in events if event["event"] == "step"))


def describe(
    config: DistillConfig,
    lesson: Lesson,
    student: Backbone,
    memory: Prefix,
    path: Path,
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    """The report without what a model has to be run for."""
    figures: dict[str, Any] = {
        "subject": config.subject,
        **({"name": lesson.job.name} if lesson.job.name else {}),
        "teacher": _teacher_name(config, lesson, student),
        "prompt_format": lesson.wording.prompt,
        "labels": "the teacher's 20 likeliest tokens" if lesson.soft else "given answers",
        "questions": len(lesson.questions),
        "held_out": {
            "questions": num_asked(lesson.test),
            "also_trained_on": _also_trained_on(lesson),
            "teacher_answers": len(lesson.taught),
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
    return figures


def _also_trained_on(lesson: Lesson) -> int:
    """Questions of the report that are trained on in the same words: what they show is memory, not understanding."""
    trained = {" ".join(question.question.split()) for question in lesson.questions}
    asked = {question.question for question in lesson.test or lesson.taught}
    return sum(" ".join(question.split()) in trained for question in asked)


def _teacher_name(config: DistillConfig, lesson: Lesson, student: Backbone) -> str:
    if not lesson.soft:
        return "the given answers"
    view = f" with the {config.subject} in view" if lesson.job.text else ""
    return f"{config.teacher or student.name}{view}"


def _readings(
    config: DistillConfig, lesson: Lesson, student: Backbone, memory: Prefix, console: Console
) -> dict[str, Reading]:
    """How well the bare model, the model with the text in view and the memory do."""
    taught = lesson.labelled
    if not (lesson.test or taught):
        return {}
    own = Teacher(student, student.name)
    views = Views(own, lesson.wording, lesson.chunks)
    alone = lesson.wording.alone()
    readers: dict[str, tuple[Wording, Sequence[Prefix | None], Sequence[Prefix | None]]] = {
        "bare": (alone, [None] * len(lesson.test), [None] * len(taught)),
        **({"in_view": (lesson.wording, views.of(lesson.test), views.of(lesson.taught))} if lesson.chunks else {}),
        "memory": (lesson.wording, [memory] * len(lesson.test), [memory] * len(taught)),
    }
    readings: dict[str, Reading] = {}
    asked_by_each = num_asked(lesson.test)
    with console.progress("report", len(readers) * asked_by_each) as bar:
        for number, (name, (wording, test_views, taught_views)) in enumerate(readers.items()):
            offset = number * asked_by_each
            labelled = taught
            if taught and wording is not lesson.wording:
                asked = encode_taught(student, lesson.taught, wording, config.prefix_length)
                labelled = [replace(one, prompt=other.prompt) for one, other in zip(taught, asked, strict=True)]
            readings[name] = read_test(
                own,
                lesson.test,
                labelled,
                test_views,
                taught_views if taught else [],
                wording,
                taught=lesson.taught if taught else (),
                batch_size=config.batch_size,
                on_batch=lambda done, offset=offset: bar.update(offset + done),  # type: ignore[misc]
            )
    return readings
