"""What fits: a text's pieces beside a question and its answer, and the text that a memory starts from."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.distillation.config import SELF, DistillConfig
from prefixtune.distillation.documents import split_document
from prefixtune.distillation.inputs import Job
from prefixtune.distillation.questioning import asking_tokens
from prefixtune.distillation.report import text_bytes
from prefixtune.distillation.wording import Wording
from prefixtune.errors import DataError

__all__ = ["START_FILE", "chunk_length", "sliding_window", "start_excerpt"]

START_FILE = "start.txt"
"""In a run's folder: what the start of a document that is too long is made from."""
_MOST_BYTES = 4 * 2**30
"""Of the keys and values of a text in view, which are all in memory while questions are answered."""
_UNBOUNDED = 4096
"""Tokens of a text in view, for a model of any number of positions."""
_OBSERVED = 64
"""Positions behind a text from which the start observes attention to it."""


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


def start_excerpt(config: DistillConfig, job: Job, student: Backbone, chunks: Sequence[str]) -> str:
    """What a memory starts from where its text is too long for that: an excerpt of every piece; empty: the text itself.

    Raises:
        DataError: The excerpt has fewer tokens than the memory has positions.
    """
    positions = student.max_positions
    if config.initialization != "text" or positions is None or not job.text:
        return ""
    # The default start reads parts of the text again behind it.
    most = positions - min(_OBSERVED, positions // 8) if config.compaction == "match" else positions
    if len(student.encode(job.text)) <= most:
        return ""
    for share in (most // len(chunks) - 2, most // len(chunks) - 8, most // (2 * len(chunks))):
        excerpt = "\n".join(split_document(student, chunk, max(share, 1))[0] for chunk in chunks)
        tokens = len(student.encode(excerpt))
        if config.prefix_length <= tokens <= most:
            return excerpt
    raise DataError(
        f"{job.text_file!r} has more tokens than the {positions:,} positions of {student.name!r}, and no excerpt of "
        f"{config.prefix_length} to {most:,} tokens was found to start from.",
        hint="choose a shorter --prefix-length, or --initialization words.",
    )


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
