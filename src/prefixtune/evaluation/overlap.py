"""Test examples that are also in the training set: their scores say little about new texts.

Two sources are equal if they differ only in white space.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from prefixtune.data.examples import Example, conversation_of, limit_targets
from prefixtune.data.registry import TASKS, read_task
from prefixtune.data.sets import locate
from prefixtune.data.streams import is_stdin
from prefixtune.prefix.hub import HUB
from prefixtune.results import Overlap
from prefixtune.training.config import TrainConfig

MAX_TRAINING_BYTES = 2**26
"""Largest training set that is read again for the comparison, which takes a few seconds."""


def find_overlap(examples: Sequence[Example], training: Sequence[Example], train: str) -> Overlap:
    """Count the examples whose source is also in a training set.

    >>> find_overlap([Example("a  b"), Example("c")], [Example(" a b", ("x",))], "my.csv").count
    1
    """
    known = set(map(_key, training))
    count = sum(_key(example) in known for example in examples)
    return Overlap(count=count, num_examples=len(examples), train=train)


def training_examples(config: TrainConfig) -> list[Example] | None:
    """The examples that a run was trained on; None: they cannot be read again.

    They are gone, on a hub, from standard input, or too large.

    Raises:
        PrefixError: The files are not what the run was trained on.
    """
    task, path = TASKS.get(config.task), config.train
    if task is None or path.startswith(HUB) or is_stdin(path) or not (task.parts or (path and Path(path).exists())):
        return None
    if not task.parts:
        located = locate(Path(path), "train", task.formats, task.release)
        files = [located] if located.is_file() else located.rglob("*")
        # Compressed text has about an eighth of its size.
        if sum(os.path.getsize(file) * (8 if file.suffix == ".gz" else 1) for file in files) > MAX_TRAINING_BYTES:
            return None
    path = path or task.parts[0]
    examples = read_task(
        config.task, path, source=config.source or None, target=config.target or None, split="train", form=config.form
    )
    return limit_targets(examples, config.limit)


def _key(example: Example) -> tuple[str, ...]:
    """The messages before the answer, or a text alone, without differences in white space and the system's message."""
    messages = [message.content for message in conversation_of(example) if message.role != "system"]
    texts = messages if any(messages) else example.targets
    return tuple(" ".join(text.split()) for text in texts)
