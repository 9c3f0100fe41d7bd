"""The report on a memory: what it knows beside the bare model and the text in view, its bytes, and the times."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import num_asked
from prefixtune.distillation.memory import Memory, text_bytes
from prefixtune.distillation.reader import Reader
from prefixtune.distillation.teacher import Teacher
from prefixtune.distillation.wording import encode_questions
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.run import TrainResult
from prefixtune.training.silence import measure_silence
from prefixtune.utils.console import Console
from prefixtune.utils.files import write_text

__all__ = ["report"]

_REPORT_FILE = "distill.json"


def report(
    config: DistillConfig,
    memory: Memory,
    student: Backbone,
    result: TrainResult,
    console: Console | None,
    texts: Sequence[TokenizedExample] = (),
) -> dict[str, Any]:
    """Report on a memory, and keep the report in its folder.

    Args:
        config: The options.
        memory: What the prefix was made from.
        student: The backbone.
        result: Of its training.
        console: Shows how the bare model, the model with the text in view and the memory are read. None: no model is
            run, and no folder is named.
        texts: The bare model's, about other things.
    """
    prefix, path = result.prefix, result.path
    assert prefix is not None
    training = sum(event["seconds"] for event in result.events if event["event"] == "step")
    seconds = {**memory.seconds, "training": float(training)}
    view = f" with the {config.subject} in view" if memory.job.text else ""
    trained = {" ".join(question.question.split()) for question in memory.questions}
    asked = {question.question for question in memory.test or memory.taught}
    held_out: dict[str, Any] = {
        "questions": num_asked(memory.test),
        # In the same words: what they show is memory, not understanding.
        "also_trained_on": sum(" ".join(question.split()) in trained for question in asked),
        "teacher_answers": len(memory.taught),
    }
    figures: dict[str, Any] = {
        "subject": config.subject,
        **({"name": memory.job.name} if memory.job.name else {}),
        "teacher": f"{config.teacher or student.name}{view}" if memory.soft else "the given answers",
        "prompt_format": memory.wording.prompt,
        "labels": "the teacher's 20 likeliest tokens" if memory.soft else "given answers",
        "questions": len(memory.questions),
        "held_out": held_out,
        "memory": path.name if console is None else str(path),
        "positions": prefix.length(),
        "bytes": path.stat().st_size,
    }
    if memory.job.text:
        tokens = len(student.encode(memory.job.text))
        figures |= {
            "text_positions": tokens,
            "text_bytes": text_bytes(student, tokens, 4 if config.save_dtype == "float32" else 2),
            "pieces_in_view": len(memory.chunks),
        }
    if console is not None:
        started = time.monotonic()
        held_out |= _readings(config, memory, student, prefix, console)
        figures |= measure_silence(student, {"general": prefix}, texts)
        if "bare" in held_out:
            figures["recovered"] = _recovered(held_out)
        seconds["report"] = time.monotonic() - started
    figures["seconds"] = {name: round(value, 1) for name, value in seconds.items()}
    write_text(memory.job.output / _REPORT_FILE, json.dumps(figures, indent=1, ensure_ascii=False) + "\n")
    return figures


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
    return {**found, "teacher": dict(memory.reading)} if memory.reading else found


def _recovered(held_out: Mapping[str, Any]) -> dict[str, float]:
    """How much of the way from the bare model to the text in view, and to the teacher, the memory goes.

    What is not better than the bare model is left out.

    >>> _recovered({"bare": {"loss": 5.0}, "in_view": {"loss": 1.0}, "memory": {"loss": 2.0}})
    {'loss': 0.75}
    """
    bare, own = held_out["bare"], held_out["memory"]
    best = {"loss": held_out.get("in_view", {}).get("loss"), "kl": 0.0}
    return {
        name: round((bare[name] - own[name]) / (bare[name] - least), 4)
        for name, least in best.items()
        if least is not None and name in bare and least < bare[name]
    }
