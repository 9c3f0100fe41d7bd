"""A memory in the making: what it is made of, whether that fits, and the pieces of it that a model can have in view."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.data import Example
from prefixtune.data.encoding import TokenizedExample
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.inputs import Job, Question
from prefixtune.distillation.questions import asking_tokens
from prefixtune.distillation.wording import ANSWER_MARGIN, Wording
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.routing import nearest
from prefixtune.training.config import TrainConfig

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
    tightest = min(readers, key=lambda reader: reader.max_positions or math.inf)
    tested, length = _tokens_to_test(job.test, student, wording), config.longest
    if not length and config.init_prefix and Path(config.init_prefix).exists():
        # A run that goes on has it in its state.
        length = load_prefix(config.init_prefix).length()
    if student.kind == "decoder" and tightest.max_positions and length + tested > tightest.max_positions:
        what = f"a held-out question and answer take up to {tested:,} tokens behind {length:,} positions"
        what += f", but {tightest.name!r} has {tightest.max_positions:,}."
        raise DataError(what, hint="shorten those of --test.")
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
        raise ConfigError(f"{student.name!r} remembers no {config.subject}.", hint="choose a decoder-only model.")
    for job in jobs:
        if job.text and (count := len(student.encode(job.text))) < config.longest:
            raise DataError(
                f"prefix_length is {config.longest}, but {job.text_file!r} has {count} tokens.",
                hint="choose a shorter one.",
            )


_MOST_BYTES = 4 * 2**30
"""Of the keys and values of a text in view, which are all in memory while questions are answered."""
_UNBOUNDED = 4096
"""Tokens of a text in view, for a model of any number of positions."""


def split_document(backbone: Backbone, text: str, length: int) -> list[str]:
    """A document in pieces of at most `length` tokens, cut at the ends of lines or sentences where there are some.

    Raises:
        DataError: A piece has no room for a single word.
    """
    if len(backbone.encode(text)) <= length:
        return [text]
    chunks, size = [""], 0
    for part in _parts(backbone, text, length):
        count = len(backbone.encode(part))
        if chunks[-1] and size + count > length:
            chunks.append("")
            size = 0
        chunks[-1] += part
        size += count
    return [chunk.strip() for chunk in chunks if chunk.strip()]


def _parts(backbone: Backbone, text: str, length: int) -> list[str]:
    """Lines; sentences of a line that is too long; halves of a sentence that is too long."""
    parts: list[str] = []
    for line in text.splitlines(keepends=True):
        sentences = [line] if len(backbone.encode(line)) <= length else re.findall(r".+?(?:[.!?]\s+|$)", line, re.S)
        while sentences:
            sentence = sentences.pop(0)
            if len(backbone.encode(sentence)) <= length:
                parts.append(sentence)
            elif len(sentence) < 2:
                raise DataError(f"no text fits into {length} tokens.", hint="choose a longer --chunk-length.")
            else:
                half = len(sentence) // 2
                cut = sentence.rfind(" ", 1, half) + 1 or half
                sentences[:0] = [sentence[:cut], sentence[cut:]]
    return parts


def with_chunks(questions: Sequence[Question], chunks: Sequence[str]) -> list[Question]:
    """The questions, each with the piece that shares most with it: rare words count more.

    >>> asked = [Question("Where is the fox?"), Question("Who flies?")]
    >>> [question.chunk for question in with_chunks(asked, ["The owl flies.", "The fox runs."])]
    [1, 0]
    """
    if len(chunks) < 2:
        return list(questions)
    find = nearest(chunks)
    return [replace(question, chunk=find(question.question) or 0) for question in questions]


# --- what fits --------------------------------------------------------------------------------------------------------


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
    tightest = min(readers, key=lambda reader: reader.max_positions or _UNBOUNDED)
    positions = tightest.max_positions or _UNBOUNDED
    around = len(student.encode(wording.view(student, ""))) + len(student.encode(wording.prompt)) + 8
    known = [*job.questions, *job.test]
    longest = max((len(student.encode(f"{item.question} {item.answer or ''}")) for item in known), default=64)
    needed = around + max(longest, 64) + config.answer_length
    if config.questions == SELF:
        needed = around + asking_tokens(student, job.text) + config.answer_length
    needed = max(needed, around + _tokens_to_test(job.test, student, wording))
    room, tokens = positions - needed, len(student.encode(job.text))
    if room < 16 or (config.subject == "prompt" and tokens > room):
        raise DataError(
            f"beside a question and its answer, {max(room, 0):,} of the {positions} positions of {tightest.name!r} are "
            f"free for a text of {tokens:,} tokens.",
            hint="lower --answer-length, or shorten the questions, the prompt, or the document's sentences.",
        )
    size = max(text_bytes(reader, tokens, reader.dtype.itemsize) for reader in readers)
    if size > _MOST_BYTES and (config.subject != "document" or not job.answered or job.test):
        raise DataError(
            f"the keys and values of {job.text_file!r} take {size / 2**30:.0f} GB, but at most {_MOST_BYTES >> 30} GB "
            "are allowed.",
            hint="divide it: a folder of documents gives a memory of each.",
        )
    return min(config.chunk_length or room, room) if config.subject == "document" else room


def _tokens_to_test(test: Sequence[Question], student: Backbone, wording: Wording) -> int:
    """Tokens of the longest held-out question in its wording, and of the answer that the model may write to it."""
    asked = [student.encode(wording.text_format.format_prompt(one.question, "")) for one in test]
    answers = [student.encode(wording.text_format.format_target(one.answer or "")) for one in test]
    return max(map(len, asked), default=0) + max(map(len, answers), default=0) + ANSWER_MARGIN * bool(test)


def text_bytes(backbone: Backbone, positions: int, bytes_per_number: int) -> int:
    """The size of the keys and values that a text of so many positions has at the sites of a memory."""
    return positions * bytes_per_number * sum(shape.size for shapes in backbone.geometry.values() for shape in shapes)
