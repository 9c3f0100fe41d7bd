"""The report on a memory: what it knows beside the bare model and the text in view, its bytes, and the times."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.chunks import text_bytes
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import num_asked
from prefixtune.distillation.memory import Memory
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import encode_questions
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.folder import Event
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

__all__ = ["describe", "read_memory", "write_report"]

_REPORT_FILE = "distill.json"


def write_report(memory: Memory, figures: dict[str, Any]) -> None:
    """Keep the report on a memory in its folder."""
    text = json.dumps(figures, indent=1, ensure_ascii=False)
    write_text(memory.job.output / _REPORT_FILE, f"{text}\n")


def describe(
    config: DistillConfig, memory: Memory, student: Backbone, prefix: Prefix, path: Path, events: Sequence[Event]
) -> dict[str, Any]:
    """The report without what a model has to be run for.

    Args:
        config: The options.
        memory: What the prefix was made from.
        student: The backbone.
        prefix: The memory that was made.
        path: Its file.
        events: Of its training.
    """
    training = sum(event["seconds"] for event in events if event["event"] == "step")
    seconds = {**memory.seconds, "training": float(training)}
    view = f" with the {config.subject} in view" if memory.job.text else ""
    figures: dict[str, Any] = {
        "subject": config.subject,
        **({"name": memory.job.name} if memory.job.name else {}),
        "teacher": f"{config.teacher or student.name}{view}" if memory.soft else "the given answers",
        "prompt_format": memory.wording.prompt,
        "labels": "the teacher's 20 likeliest tokens" if memory.soft else "given answers",
        "questions": len(memory.questions),
        "held_out": {
            "questions": num_asked(memory.test),
            "also_trained_on": _also_trained_on(memory),
            "teacher_answers": len(memory.taught),
        },
        "memory": str(path),
        "positions": prefix.length(),
        "bytes": path.stat().st_size,
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
    }
    if memory.job.text:
        tokens = len(student.encode(memory.job.text))
        figures |= {
            "text_positions": tokens,
            "text_bytes": text_bytes(student, tokens, 4 if config.save_dtype == "float32" else 2),
            "pieces_in_view": len(memory.chunks),
        }
    return figures


def _also_trained_on(memory: Memory) -> int:
    """Questions of the report that are trained on in the same words: what they show is memory, not understanding."""
    trained = {" ".join(question.question.split()) for question in memory.questions}
    asked = {question.question for question in memory.test or memory.taught}
    return sum(" ".join(question.split()) in trained for question in asked)


def read_memory(
    config: DistillConfig, memory: Memory, student: Backbone, prefix: Prefix, figures: dict[str, Any], console: Console
) -> None:
    """Add to a report how well the bare model, the model with the text in view, and the memory do.

    Args:
        config: The options.
        memory: What the prefix was made from.
        student: The backbone.
        prefix: The memory that was made.
        figures: What `describe` says; the readings are added to it.
        console: Shows the progress.
    """
    started = time.monotonic()
    held_out = figures["held_out"] | _readings(config, memory, student, prefix, console)
    if memory.reading:
        held_out["teacher"] = dict(memory.reading)
    bare, seen, own = (held_out.get(name) for name in ("bare", "in_view", "memory"))
    if bare is not None and own is not None:
        shares = {
            "loss": _recovered(bare.get("loss"), (seen or {}).get("loss"), own.get("loss")),
            "kl": _recovered(bare.get("kl"), 0.0, own.get("kl")),
        }
        figures["recovered"] = {name: round(share, 4) for name, share in shares.items() if share is not None}
    figures["held_out"] = held_out
    figures["seconds"]["report"] = round(time.monotonic() - started, 1)


def _readings(
    config: DistillConfig, memory: Memory, student: Backbone, prefix: Prefix, console: Console
) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    if not (memory.test or memory.labelled):
        return found
    wording, pieces, asked = memory.wording, max(len(memory.chunks), 1), num_asked(memory.test)
    readers = {"bare": Reader(student, wording.alone(), [None] * pieces, config.batch_size)}
    if memory.chunks:
        readers["in_view"] = Teacher(student, student.name).reader(wording, memory.chunks, config.batch_size)
    readers["memory"] = Reader(student, wording, [prefix] * pieces, config.batch_size)
    with console.progress("report", len(readers) * asked) as bar:
        for number, (name, reader) in enumerate(readers.items()):
            found[name] = reader.read(memory.test, lambda done, before=number * asked: bar.update(before + done))  # type: ignore[misc]
            if memory.labelled:
                # The prompts are in the reader's words, the labels the teacher's.
                encoded = encode_questions(student, memory.taught, reader.wording, prefix.length())
                labelled = [replace(a, prompt=b.prompt) for a, b in zip(memory.labelled, encoded, strict=True)]
                found[name]["kl"] = reader.mean_loss(labelled, memory.taught)
    return found


def _recovered(bare: float | None, best: float | None, memory: float | None) -> float | None:
    """How much of the way from the bare model to the best one the memory goes; None: the best one is not better.

    >>> _recovered(5.0, 1.0, 2.0)
    0.75
    """
    if bare is None or best is None or memory is None or best >= bare:
        return None
    return (bare - memory) / (bare - best)
