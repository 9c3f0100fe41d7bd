"""A memory in the making: what it is made of, and whether that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import Example
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.chunks import chunk_length, split_document, with_chunks
from prefixtune.distillation.config import DistillConfig
from prefixtune.distillation.inputs import Job, Question
from prefixtune.distillation.wording import Wording
from prefixtune.errors import ConfigError, DataError
from prefixtune.training.config import TrainConfig

__all__ = ["START_FILE", "Memory", "check_student", "plan_memory"]

START_FILE = "start.txt"
"""In a run's folder: the text as it stands in view, which a memory starts from."""


@dataclass(eq=False)
class Memory:
    """A memory in the making.

    Attributes:
        job: What it is made of.
        run: Its training.
        wording: The text around questions and answers.
        soft: The teacher's likeliest tokens are the labels; else the answers are.
        chunks: The text in pieces that the teacher has in view; empty: there is no text.
        test: Held out, each with its piece; answers are the given ones.
        questions: To train on, each with an answer.
        taught: Held out, with the teacher's answers; empty where the answers are the labels.
        reading: How well a teacher that is not the student does on `test`; empty: there is none.
        labelled: `taught` as tokens with the teacher's labels.
        seconds: What each phase took.
        sources: A hash of what its questions were made from.
    """

    job: Job
    run: TrainConfig
    wording: Wording
    soft: bool
    chunks: Sequence[str]
    test: Sequence[Question]
    questions: Sequence[Question] = ()
    taught: Sequence[Question] = ()
    reading: Mapping[str, Any] = field(default_factory=dict)
    labelled: Sequence[TokenizedExample] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    sources: str = ""

    @property
    def examples(self) -> list[Example]:
        """The questions with their answers, to train on."""
        return [Example(question.question, (question.answer or "",)) for question in self.questions]

    @property
    def title(self) -> str:
        """What messages add about it: ` of NAME`, where there are several."""
        return f" of {self.job.name}" if self.job.name else ""


def plan_memory(config: DistillConfig, job: Job, readers: Sequence[Backbone], wording: Wording) -> Memory:
    """Check that a job's text fits, and cut it into pieces.

    Args:
        config: The options.
        job: What the memory is made of.
        readers: Who has the text in view: the student, and a teacher of its own with the same tokenizer.
        wording: The text around questions and answers.

    Raises:
        DataError: The text does not fit.
    """
    student, output = readers[0], str(job.output)
    chunks = split_document(student, job.text, chunk_length(config, job, readers, wording)) if job.text else []
    changes: dict[str, Any] = {"output": output, "prompt_format": wording.prompt, "target_format": wording.target}
    if config.run_name and job.name:
        changes["run_name"] = f"{config.run_name}/{job.name}"
    if config.initialization == "text":
        changes |= {"init_text": f"@{job.output / START_FILE}"} if job.text else {"initialization": "words"}
    soft = config.subject != "document" or not job.answered
    return Memory(job, config.training.replace(**changes), wording, soft, chunks, with_chunks(job.test, chunks))


def check_student(config: DistillConfig, student: Backbone, jobs: Sequence[Job]) -> None:
    """Refuse what needs the backbone to be seen.

    Raises:
        ConfigError: The backbone cannot have a text in view.
        DataError: A document or prompt is shorter than the memory.
    """
    if student.kind == "encoder" or (config.subject != "teacher" and student.kind != "decoder"):
        raise ConfigError(
            f"{student.name!r} is of kind {student.kind!r}, but a {config.subject} is distilled into a decoder-only "
            "model.",
            hint="choose another backbone; encoder-decoders can learn from a --teacher.",
        )
    for job in jobs:
        if job.text and (count := len(student.encode(job.text))) < config.prefix_length:
            raise DataError(
                f"prefix_length is {config.prefix_length}, but {job.text_file!r} has {count} tokens.",
                hint="choose a shorter --prefix-length: a memory is to be shorter than its text.",
            )
