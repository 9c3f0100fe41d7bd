"""What a run's folder keeps of a distillation: questions with answers, what they were made from, and the times."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data.streams import read_text
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.documents import Question
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.teacher import teaches_on_student
from prefixtune.errors import CheckpointError, DataError
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.utils.files import write_text

__all__ = [
    "QUESTIONS_FILE",
    "check_sources",
    "read_prepared",
    "read_seconds",
    "with_answers",
    "write_prepared",
    "write_seconds",
    "write_sources",
]

QUESTIONS_FILE, SOURCES_FILE, SECONDS_FILE = "questions.jsonl", "sources.json", "seconds.json"
_SAMPLE = 2**20
"""Bytes of a teacher's large file that are hashed at either end."""
_SETTINGS = ("ask", "prompt_format", "target_format", "answer_length", "chunk_length", "num_questions", "kinds")
"""Options that decide what is kept of a teacher's work."""


# --- questions -------------------------------------------------------------------------------------------------------


def write_prepared(job: Job, questions: Sequence[Question], test: Sequence[Question]) -> None:
    """Keep the questions of a run, with their answers, in its folder, atomically."""
    rows = [
        {**asdict(question), "held_out": held} for held, part in ((False, questions), (True, test)) for question in part
    ]
    write_text(job.output / QUESTIONS_FILE, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_prepared(job: Job, num_chunks: int) -> tuple[list[Question], list[Question]] | None:
    """The questions that a run keeps; None: it has none yet.

    Args:
        job: The memory.
        num_chunks: The pieces of its text; 0: there is no text.

    Raises:
        CheckpointError: The file is damaged.
    """
    path = job.output / QUESTIONS_FILE
    if not path.exists():
        return None
    parts: tuple[list[Question], list[Question]] = ([], [])
    try:
        # JSON escapes line feeds, but not the other ends of lines that `splitlines` knows.
        for line in read_text(path).removesuffix("\n").split("\n"):
            row: dict[str, Any] = json.loads(line)
            held_out = row.pop("held_out")
            question = _checked(Question(**row), held_out, num_chunks)
            parts[held_out].append(question)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, DataError) as error:
        raise CheckpointError(
            f"{str(path)!r} does not hold the questions of a run.", hint="delete it: they are made again."
        ) from error
    if not parts[0]:
        raise CheckpointError(f"{str(path)!r} holds no question to train on.", hint="delete it: they are made again.")
    return parts


def _checked(question: Question, held_out: object, num_chunks: int) -> Question:
    """The question of a stored row.

    Raises:
        ValueError: A field is not what is stored.
    """
    texts = [getattr(question, field.name) for field in fields(question) if field.type == "str"]
    valid = (
        type(held_out) is bool
        and all(isinstance(text, str) for text in texts)
        and isinstance(question.answer, str)
        and bool(question.question and question.answer)
        and type(question.ended) is bool
        and type(question.chunk) is int
        and 0 <= question.chunk < max(num_chunks, 1)
    )
    if not valid:
        raise ValueError("a field is wrong")
    return question


def with_answers(questions: Sequence[Question], answers: Sequence[tuple[str, bool]]) -> list[Question]:
    """The questions with these answers, each with whether it ended by itself; those without a word are left out."""
    pairs = zip(questions, answers, strict=True)
    return [replace(question, answer=answer, ended=ended) for question, (answer, ended) in pairs if answer]


# --- what they were made from ----------------------------------------------------------------------------------------


def write_sources(config: DistillConfig, job: Job, student: Backbone) -> None:
    """Keep the hashes of what a memory is made from."""
    write_text(job.output / SOURCES_FILE, json.dumps(_sources(config, job, student), indent=1) + "\n")


def check_sources(config: DistillConfig, job: Job, student: Backbone) -> None:
    """Refuse to go on with another document, prompt, questions or teacher than those that the run began with.

    Args:
        config: The options.
        job: The memory.
        student: The backbone, which may be the teacher.

    Raises:
        CheckpointError: One is another; or the file is damaged.
    """
    path = job.output / SOURCES_FILE
    if not path.exists():
        return
    try:
        kept = json.loads(read_text(path))
        if not isinstance(kept, Mapping):
            raise TypeError
    except (ValueError, TypeError, RecursionError, DataError) as error:
        raise CheckpointError(
            f"{str(path)!r} does not say what a run was made from.", hint="start again in another --output."
        ) from error
    present = _sources(config, job, student)
    others = [name for name, value in present.items() if name in kept and not _is_same(name, kept[name], value)]
    if others:
        raise CheckpointError(
            f"the distillation in {str(job.output)!r} was begun with another {' and another '.join(others)}.",
            hint="give what it was begun with, or start again in another --output.",
        )


def _is_same(name: str, one: object, other: Any) -> bool:
    """Whether a source is the one that was kept; a backbone may have been rounded to another dtype."""
    return one == other or (name == "backbone" and fingerprints_match(str(one), other))


def _sources(config: DistillConfig, job: Job, student: Backbone) -> dict[str, Any]:
    """A hash by what is learned from; settings as they are."""
    hashes: dict[str, Any] = {
        "teacher": _teacher_hash(config.teacher),
        "questions" if config.document else "data": config.questions if not job.questions else _hash(job.questions),
    }
    if job.text:
        hashes[config.subject] = hashlib.sha256(job.text.encode("utf-8", "surrogatepass")).hexdigest()
    if config.subject != "document" or not job.answered:
        # The teacher answers these too; otherwise only the report reads them.
        hashes["test"] = _hash(job.test)
        hashes["dtype"] = student.dtype_name
        if teaches_on_student(config):
            hashes["backbone"] = student.fingerprint
        hashes |= {name: json.loads(json.dumps(getattr(config, name))) for name in _SETTINGS}
    return hashes


def _hash(questions: Sequence[Question]) -> str:
    rows = [[question.question, question.answer] for question in questions]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _teacher_hash(teacher: str) -> str:
    """Of a teacher's name, and of its files where it is one or a folder: of large ones, their size and both ends."""
    digest = hashlib.sha256()
    root = Path(teacher)
    if not teacher or not root.exists():
        return teacher
    files = [root] if root.is_file() else sorted(path for path in root.iterdir() if path.is_file())
    for path in files:
        if path.suffix not in (".safetensors", ".gguf", ".json", ".bin", ".toml"):
            continue
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            file.seek(max(size - _SAMPLE, 0))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


# --- times -----------------------------------------------------------------------------------------------------------


def read_seconds(job: Job) -> dict[str, float]:
    """What each phase took in earlier sittings; nothing where that is not known."""
    try:
        kept = json.loads((job.output / SECONDS_FILE).read_text(encoding="utf-8"))
        pairs = [(str(name), float(value)) for name, value in kept.items()]
    except (OSError, ValueError, TypeError, AttributeError, OverflowError, RecursionError):
        return {}
    return {name: value for name, value in pairs if math.isfinite(value) and value >= 0}


def write_seconds(job: Job, seconds: Mapping[str, float]) -> None:
    """Keep what each phase took so far."""
    write_text(job.output / SECONDS_FILE, json.dumps(seconds) + "\n")
