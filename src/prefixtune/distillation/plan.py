"""What is to be made of a job: checked for every job before anything is written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.documents import Question, chunk_of_question, split_document
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.questioning import asking_tokens
from prefixtune.distillation.report import text_bytes
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError
from prefixtune.training.config import TrainConfig
from prefixtune.utils.console import Console

__all__ = ["START_FILE", "Plan", "chunk_length", "make_plan", "sliding_window", "start_excerpt", "with_chunks"]


START_FILE = "start.txt"
"""In a run's folder: what the start of a document that is too long is made from."""
_MOST_BYTES = 4 * 2**30
"""Of the keys and values of a text in view, which are all in memory while questions are answered."""
_UNBOUNDED = 4096
"""Tokens of a text in view, for a model of any number of positions."""
_OBSERVED = 64
"""Positions behind a text from which the start observes attention to it."""


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
    excerpt = start_excerpt(config, job, student)
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


# --- what fits -------------------------------------------------------------------------------------------------------


def chunk_length(config: DistillConfig, job: Job, readers: Sequence[Backbone], wording: Wording) -> int:
    """Tokens of the text that fit into the view with a question and its answer.

    Args:
        config: The options.
        job: The memory.
        readers: Who has the text in view: the student, and a teacher of its own with the same tokenizer.
        wording: The text around questions and answers.

    Raises:
        DataError: Nothing fits, or the keys and values of the text are too large.
    """
    student = readers[0]
    positions = min(reader.max_positions or _UNBOUNDED for reader in readers)
    around = len(student.encode(wording.view(student, ""))) + len(student.encode(wording.prompt)) + 8
    known = [*job.questions, *job.test]
    longest = max((len(student.encode(f"{item.question} {item.answer or ''}")) for item in known), default=64)
    needed = around + max(longest, 64) + config.answer_length
    if config.questions == SELF:
        asking, answering = asking_tokens(student, job.text, config.kinds)
        needed = max(needed, around + answering + config.answer_length, around + asking)
    room = positions - needed
    if room < 16:
        what = "a question that is made here" if config.questions == SELF else "its longest question"
        raise DataError(
            f"the {positions} positions of {student.name!r} have no room for a text, {what} and an "
            f"answer of {config.answer_length} tokens.",
            hint="lower --answer-length, or shorten the questions or, with --questions self, the document's sentences.",
        )
    tokens = len(student.encode(job.text))
    if config.subject == "prompt" and tokens > room:
        raise DataError(
            f"the prompt {job.text_file!r} has {tokens:,} tokens, but {room:,} are free beside an input and its "
            "answer.",
            hint="shorten it, or lower --answer-length.",
        )
    if config.subject != "document" or not job.answered or job.test:
        _check_bytes(job, readers, tokens)
    return min(config.chunk_length or room, room) if config.subject == "document" else room


def _check_bytes(job: Job, readers: Sequence[Backbone], tokens: int) -> None:
    """Refuse a text whose keys and values would fill the memory.

    Raises:
        DataError: They would.
    """
    size = max(text_bytes(reader, tokens, reader.dtype.itemsize) for reader in readers)
    if size > _MOST_BYTES:
        raise DataError(
            f"the keys and values of {job.text_file!r} take {size / 2**30:.0f} GB, but at most {_MOST_BYTES >> 30} GB "
            "are allowed.",
            hint="divide it: a folder of documents gives a memory of each.",
        )


def start_excerpt(config: DistillConfig, job: Job, student: Backbone) -> str:
    """What a memory starts from where its text is too long for that: its beginning; empty: the text itself."""
    positions = student.max_positions
    if config.initialization != "text" or positions is None or not job.text:
        return ""
    # The default start reads parts of the text again behind it.
    most = positions - min(_OBSERVED, positions // 8) if config.compaction == "match" else positions
    return "" if len(student.encode(job.text)) <= most else split_document(student, job.text, most)[0]


def sliding_window(backbone: Backbone) -> int | None:
    """The shortest distance up to which a layer sees; None: all layers see the whole text."""
    configs = {id(module.config): module.config for module in backbone.model.modules() if hasattr(module, "config")}
    lengths = [length for config in configs.values() for length in _windows(config)]
    return min(lengths, default=None)


def _windows(config: Any) -> list[int]:
    read = partial(getattr, config)
    layer_types = read("layer_types", None) or ("sliding_attention",)
    found: list[Any] = []
    for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size")):
        value = read(name, None) if kind in layer_types else None
        found.extend(value if isinstance(value, list) else [value])
    return [value for value in found if type(value) is int and value > 0]
