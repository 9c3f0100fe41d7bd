"""A text in the pieces that a model can have in view: how long they may be, and which one a question is about."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.inputs import Job, Question
from prefixtune.distillation.questions import asking_tokens
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError
from prefixtune.prefix.routing import nearest

__all__ = ["chunk_length", "split_document", "text_bytes", "with_chunks"]

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
                space = sentence.rfind(" ", 1, half)
                cut = space + 1 if space > 0 else half
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
    positions = min(reader.max_positions or _UNBOUNDED for reader in readers)
    around = len(student.encode(wording.view(student, ""))) + len(student.encode(wording.prompt)) + 8
    known = [*job.questions, *job.test]
    longest = max((len(student.encode(f"{item.question} {item.answer or ''}")) for item in known), default=64)
    needed = around + max(longest, 64) + config.answer_length
    if config.questions == SELF:
        needed = around + asking_tokens(student, job.text) + config.answer_length
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
    size = max(text_bytes(reader, tokens, reader.dtype.itemsize) for reader in readers)
    if size > _MOST_BYTES and (config.subject != "document" or not job.answered or job.test):
        raise DataError(
            f"the keys and values of {job.text_file!r} take {size / 2**30:.0f} GB, but at most {_MOST_BYTES >> 30} GB "
            "are allowed.",
            hint="divide it: a folder of documents gives a memory of each.",
        )
    return min(config.chunk_length or room, room) if config.subject == "document" else room


def text_bytes(backbone: Backbone, positions: int, bytes_per_number: int) -> int:
    """The size of the keys and values that a text of so many positions has at the sites of a memory."""
    return positions * bytes_per_number * sum(shape.size for shapes in backbone.geometry.values() for shape in shapes)
