"""The cells of a study: which runs there are, and in which order.

The order is by repetition, so that a study that is cut short has every point once before it has one twice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from prefixtune.studies.config import StudyConfig, backbone_name
from prefixtune.studies.kinds import PREFIX_METHODS, UNTRAINED, Method, base_method

__all__ = ["Cell", "plan"]


@dataclass(frozen=True)
class Cell:
    """One run of a study.

    Attributes:
        method: One of `METHODS`; with a size, as in `adapter:8`, or without; or the name of a variant.
        num_targets: Training targets; 0: all.
        prefix_length: P; 0 where the method has no prefix.
        initialization: One of `Start`, such as `examples` (as many as fit the prefix's length); empty where the method
            has no prefix.
        subset: Index of the sample of the training set.
        seed: Of the initial values and the order of the data.
        variant_of: The method that a variant varies, with its size; empty: it is none.
        backbone: One of several backbones; empty: the study's only one.
    """

    method: str
    num_targets: int
    prefix_length: int
    initialization: str
    subset: int = 0
    seed: int = 0
    variant_of: str = ""
    backbone: str = ""

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
        backbone = [backbone_name(self.backbone)] if self.backbone else []
        return "-".join([*backbone, self.method.replace(":", ""), size, *prefix])

    @property
    def id(self) -> str:
        """The name of the cell and of its folder."""
        return f"{self.group}-subset{self.subset}-seed{self.seed}"

    @property
    def base_method(self) -> Method:
        """The method without its size; of a variant, that of the method that it varies."""
        return cast(Method, base_method(self.variant_of or self.method))

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
        factors: dict[str, Any] = {"backbone": backbone_name(self.backbone)} if self.backbone else {}
        factors |= {"method": self.method, "num_targets": self.num_targets}
        if self.prefix_length:
            factors |= {"prefix_length": self.prefix_length, "initialization": self.initialization}
        return {**factors, "subset": self.subset, "seed": self.seed}


def plan(config: StudyConfig) -> list[Cell]:
    """All cells of a study, in the order in which they are run."""
    return list(dict.fromkeys(_cells(config)))


def _cells(config: StudyConfig) -> Iterator[Cell]:
    only = config.backbone if "backbone" in config.kind.factors else ""
    for subset, seed in config.repeats:
        for backbone in config.backbones or (only,):
            for size in config.sizes:
                for method in config.methods:
                    if method in config.once and (subset, seed) != (0, 0):
                        continue
                    yield from _repetition(config, Cell(method, size, 0, "", subset, seed, backbone=backbone))


def _repetition(config: StudyConfig, cell: Cell) -> Iterator[Cell]:
    """A method's cells of one sample, seed and size: one, or one for each length and start of its prefix."""
    name = cell.method
    if not cell.trains:
        yield Cell(name, 0, 0, "", backbone=cell.backbone)
        return
    variant_of = config.method_of(name) if name in config.variants else ""
    # A training set that is used whole has one sample.
    cell = replace(cell, variant_of=variant_of, subset=cell.subset if cell.num_targets else 0)
    if cell.base_method not in PREFIX_METHODS:
        yield cell
        return
    for length in config.lengths_of(name):
        for start in config.starts_of(name):
            yield replace(cell, prefix_length=length, initialization=start)
