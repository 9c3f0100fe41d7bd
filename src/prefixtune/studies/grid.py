"""The cells of a study: which runs there are, and in which order.

The order is by repetition, so that a study that is cut short has every point once before it has one twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

from prefixtune.studies.config import StudyConfig
from prefixtune.studies.kinds import UNTRAINED, Method, base_method

__all__ = ["Cell", "plan"]


_WITH_PREFIX = ("prefix", "prompt", "infix")


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        method: One of `METHODS`; with a size, as in `adapter:8`, or without.
        num_targets: Training targets; 0: all.
        prefix_length: P; 0 where the method has no prefix.
        initialization: `task`, `unrelated`, `random` or `examples` (as many as fit the prefix's length); empty where
            the method has no prefix.
        subset: Index of the sample of the training set.
        seed: Of the initial values and the order of the data.
    """

    method: str
    num_targets: int
    prefix_length: int
    initialization: str
    subset: int = 0
    seed: int = 0

    @property
    def group(self) -> str:
        """The point of the grid that this is a repetition of; a learning rate is chosen for each group.

        >>> Cell("prefix", 100, 10, "task", subset=2, seed=1).group
        'prefix-n100-P10-task'
        >>> Cell("full", 0, 0, "").group
        'full-all'
        """
        size = f"n{self.num_targets}" if self.num_targets else "all"
        prefix = [f"P{self.prefix_length}", self.initialization] if self.prefix_length else []
        return "-".join([self.method.replace(":", ""), size, *prefix])

    @property
    def id(self) -> str:
        """The name of the cell and of its folder."""
        return f"{self.group}-subset{self.subset}-seed{self.seed}"

    @property
    def base_method(self) -> Method:
        """The method without its size."""
        return cast(Method, base_method(self.method))

    @property
    def trains(self) -> bool:
        """Whether anything is trained."""
        return self.method not in UNTRAINED

    @property
    def is_first(self) -> bool:
        """Whether it is the repetition that chooses its group's learning rate."""
        return self.subset == 0 and self.seed == 0

    def factors(self) -> dict[str, Any]:
        """What distinguishes it from other cells, for reports."""
        factors: dict[str, Any] = {"method": self.method, "num_targets": self.num_targets}
        if self.prefix_length:
            factors |= {"prefix_length": self.prefix_length, "initialization": self.initialization}
        return {**factors, "subset": self.subset, "seed": self.seed}


def plan(config: StudyConfig) -> list[Cell]:
    """All cells of a study, in the order in which they are run."""
    return list(dict.fromkeys(_cells(config)))


def _cells(config: StudyConfig) -> Iterator[Cell]:
    for seed in range(config.seeds):
        for subset in range(config.subsets):
            for size in config.sizes:
                for method in config.methods:
                    if method in UNTRAINED:
                        yield Cell(method, 0, 0, "")
                        continue
                    # A training set that is used whole has one sample.
                    sample = subset if size else 0
                    if method not in _WITH_PREFIX:
                        yield Cell(method, size, 0, "", sample, seed)
                        continue
                    for length in config.lengths:
                        for start in config.starts:
                            yield Cell(method, size, length, start, sample, seed)
