"""What a run's folder keeps of a teacher's work: questions with answers, and what they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.streams import read_text
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.utils.files import write_text

__all__ = ["Prepared", "read_prepared", "source_digest", "write_prepared"]

QUESTIONS_FILE, SOURCES_FILE = "questions.jsonl", "sources.json"
_SETTINGS = ("teacher", "questions", "ask", "prompt_format", "target_format", "answer_length", "chunk_length")
_SETTINGS_OF_QUESTIONS = ("num_questions", "kinds", "seed")
"""Options that decide what a teacher makes."""


@dataclass(frozen=True)
class Prepared:
    """What a teacher has made of a memory's text.

    Attributes:
        questions: To train on, with answers.
        taught: Held-out ones, with answers.
        reading: How well a teacher that is not the student does on held-out questions; empty: there is none.
    """

    questions: Sequence[Question]
    taught: Sequence[Question]
    reading: Mapping[str, Any] = field(default_factory=dict)


def source_digest(config: DistillConfig, job: Job, student: Backbone) -> str:
    """Tells what a teacher's work is made from, and how, from anything else."""
    settings = {name: getattr(config, name) for name in (*_SETTINGS, *_SETTINGS_OF_QUESTIONS)}
    asked = [[question.question, question.answer] for question in (*job.questions, *job.test)]
    facts = [settings, job.text, asked, len(job.questions), student.fingerprint, student.dtype_name]
    return hashlib.sha256(json.dumps([*facts, *_teacher_files(config.teacher)]).encode()).hexdigest()


def _teacher_files(teacher: str) -> list[tuple[str, int, str]]:
    """Name, size and a hash of the last megabyte of a teacher's files of weights, where it is on this machine."""
    path, found = Path(teacher), list[tuple[str, int, str]]()
    for part in [] if not teacher else [path] if path.is_file() else sorted(path.glob("*.safetensors")):
        with open(part, "rb") as file:
            file.seek(max(part.stat().st_size - 2**20, 0))
            found.append((part.name, part.stat().st_size, hashlib.sha256(file.read()).hexdigest()))
    return found


def write_prepared(folder: Path, digest: str, prepared: Prepared) -> None:
    """Keep a teacher's work in a run's folder; the file of its sources comes last."""
    parts = ((False, prepared.questions), (True, prepared.taught))
    rows = [{**asdict(question), "held_out": held} for held, part in parts for question in part]
    write_text(folder / QUESTIONS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_text(folder / SOURCES_FILE, json.dumps({"made_from": digest, "teacher": dict(prepared.reading)}) + "\n")


def read_prepared(folder: Path, digest: str) -> Prepared | None:
    """The work that a run's folder keeps; None: it has none yet.

    Raises:
        CheckpointError: It was made from something else, or a file is damaged.
    """
    if not (folder / SOURCES_FILE).exists():
        return None
    parts: tuple[list[Question], list[Question]] = ([], [])
    try:
        sources: dict[str, Any] = json.loads(read_text(folder / SOURCES_FILE))
        # JSON escapes line feeds, but not the other ends of lines that `splitlines` knows.
        for line in read_text(folder / QUESTIONS_FILE).removesuffix("\n").split("\n"):
            row: dict[str, Any] = json.loads(line)
            parts[bool(row.pop("held_out"))].append(Question(**row))
        made_from, reading = sources["made_from"], sources["teacher"]
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, PrefixError) as error:
        raise CheckpointError(
            f"{str(folder / QUESTIONS_FILE)!r} does not hold the questions of a run.",
            hint=f"delete {SOURCES_FILE} beside it: they are made again.",
        ) from error
    if made_from != digest:
        raise CheckpointError(
            f"the distillation in {str(folder)!r} was begun with another text, other questions, options or teacher.",
            hint="give what it was begun with, or start again in another --output.",
        )
    return Prepared(*parts, reading)
