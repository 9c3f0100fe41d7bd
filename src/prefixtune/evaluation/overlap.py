"""Test examples that stand in the training set: their scores say little of texts that are new.

Two sources are the same where they agree but for white space. Knows nothing of models.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.data.examples import Example, limit_targets
from prefixtune.data.folders import locate
from prefixtune.data.registry import TASKS, read_task
from prefixtune.prefix.hub import HUB
from prefixtune.training.config import TrainConfig

__all__ = ["Overlap", "find_overlap", "training_examples"]


_MOST_BYTES = 2**26
"""Of a training set that is read again to compare with: a few seconds' work."""


@dataclass(frozen=True)
class Overlap:
    """How many test sources stand in a training set.

    Attributes:
        count: They.
        total: All test sources.
        train: The training set, for people.
    """

    count: int
    total: int
    train: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        share = round(self.count / self.total, 4) if self.total else 0.0
        return {"count": self.count, "share": share, "num_examples": self.total, "train": self.train}

    def __str__(self) -> str:
        share = self.count / max(self.total, 1)
        return (
            f"{self.count:,} of {self.total:,} test sources ({share:.1%}) stand in the training set {self.train!r}, "
            "too: the scores say less of texts that are new"
        )


def find_overlap(examples: Sequence[Example], training: Sequence[Example], train: str) -> Overlap:
    """Count the examples whose source stands in a training set.

    >>> find_overlap([Example("a  b"), Example("c")], [Example(" a b", ("x",))], "my.csv").count
    1
    """
    known = {_plain(example.source) for example in training}
    return Overlap(sum(_plain(example.source) in known for example in examples), len(examples), train)


def training_examples(config: TrainConfig) -> list[Example] | None:
    """What a run was trained on, as far as it is at hand; None: it is gone, on a hub, or too large to be read again.

    Raises:
        PrefixError: The files are no more what the run was trained on.
    """
    task = TASKS.get(config.task)
    if task is None or config.train.startswith(HUB) or not (config.train or task.parts):
        return None
    path = config.train or task.parts[0]
    if not task.parts:
        if not Path(path).exists():
            return None
        found = locate(Path(path), "train", task.formats, task.release)
        files = [found] if found.is_file() else [file for file in found.rglob("*") if file.is_file()]
        # Zipped text is about an eighth of its size.
        if sum(file.stat().st_size * (8 if file.suffix == ".gz" else 1) for file in files) > _MOST_BYTES:
            return None
    read = read_task(config.task, path, source=config.source or None, target=config.target or None, split="train")
    return limit_targets(read, config.limit)


def _plain(source: str) -> str:
    return " ".join(source.split())
