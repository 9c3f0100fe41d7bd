"""What a study runs on: its backbone, its examples, and the samples of them that each cell gets."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.devices import choose_device, choose_dtype
from prefixtune.backbone.load import load_backbone
from prefixtune.data import Example, read_task
from prefixtune.data.windows import is_text
from prefixtune.errors import ConfigError, DataError
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.studies.config import StudyConfig
from prefixtune.studies.grid import Cell
from prefixtune.studies.kinds import Split

__all__ = ["SharedBackbone", "StudyData"]


class SharedBackbone:
    """The frozen model of all cells that leave it as it is, loaded when it is first needed.

    Args:
        config: The study.
        backbone: Already loaded; None: load it when it is needed.
    """

    def __init__(self, config: StudyConfig, backbone: Backbone | None = None) -> None:
        self._config, self._backbone, self._name = config, backbone, config.backbone
        self.is_preloaded = backbone is not None

    @property
    def dtype_name(self) -> str:
        """The dtype that it has or will have."""
        return self.own_dtype_name if self._backbone is None else self._backbone.dtype_name

    @property
    def own_dtype_name(self) -> str:
        """The dtype of what the study loads itself."""
        dtype = choose_dtype(self._config.dtype, choose_device(self._config.device))
        return str(dtype).removeprefix("torch.")

    def check_same(self, name: str, stored: Mapping[str, str]) -> str:
        """Load a model of the study, and compare it with the one that the study began with.

        Args:
            name: Its name; of a study with one model it is empty.
            stored: Name of a model -> its fingerprint.

        Returns:
            Its fingerprint as it is now.

        Raises:
            ConfigError: The weights are others.
        """
        if name:
            self.choose(name)
        fingerprint = self.get().fingerprint
        if name in stored and not fingerprints_match(stored[name], fingerprint):
            raise ConfigError(
                f"the study in {str(self._config.folder)!r} began with another model than {self._name!r} is now.",
                hint="put the first one back, or choose another output.",
            )
        return fingerprint

    def choose(self, name: str) -> None:
        """Which one `get` returns from now on, where a study has several."""
        if name != self._name:
            self._name, self._backbone = name, None

    def get(self) -> Backbone:
        """The model."""
        if self._backbone is None:
            config = self._config
            self._backbone = load_backbone(self._name, dtype=config.dtype, device=config.device)
        return self._backbone

    def release(self) -> None:
        """Drop the model, unless the caller loaded it; `get` loads it again."""
        if not self.is_preloaded:
            self._backbone = None


@dataclass(frozen=True)
class StudyData:
    """The examples of a study; each split is read once, when it is first needed.

    Raises:
        ConfigError: A split is needed that the study does not name.
        DataError: A split cannot be read, or is too small for what is drawn from it.
    """

    config: StudyConfig

    @cached_property
    def train(self) -> list[Example]:
        """All training examples."""
        return self._read("train")

    @cached_property
    def dev(self) -> list[Example]:
        """All development examples."""
        return self._read("dev")

    @cached_property
    def test(self) -> list[Example]:
        """The test examples that are scored."""
        return sample_examples(self._read("test"), self.config.test_limit, "test")

    def _read(self, split: Split) -> list[Example]:
        path = getattr(self.config, split) or self.config.data
        if not path:
            raise ConfigError(
                f"the study has no {split} data.", hint=f"set data (a folder) or {split}, in the file or as an option."
            )
        # Templates for the user's own columns, as in `prefixtune train`.
        columns: dict[str, Any] = {name: self.config.train_settings.get(name) for name in ("source", "target")}
        columns["form"] = self.config.train_settings.get("form", "")
        examples = [e for e in read_task(self.config.task, path, split=split, **columns) if e.targets]
        if not examples:
            raise DataError(f"{path} has no example with a target.", hint="give data with references.")
        if all(is_text(example) for example in examples):
            raise DataError(
                f"{path} holds texts alone, but a study compares outputs with references.",
                hint="give source and target, in [train_settings].",
            )
        return examples

    def for_cell(self, cell: Cell) -> tuple[list[Example], list[Example]]:
        """The training sample of a cell, and the development sample that its best step is chosen by."""
        config = self.config
        train = sample_targets(self.train, cell.num_targets, config.sample, f"train/{cell.subset}")
        available = count_targets(self.dev)
        if config.dev_share:
            count = min(available, max(1, round(config.dev_share * count_targets(train))))
            return train, sample_pairs(self.dev, count, f"dev/{cell.subset}")
        if not 0 < config.dev_limit < available:
            return train, self.dev
        return train, sample_sources(self.dev, config.dev_limit, "dev")

    def shots(self) -> list[Example]:
        """The solved examples that few-shot shows: of the smallest sample that other methods train on."""
        config = self.config
        smallest = sample_targets(self.train, config.smallest_size, config.sample, "train/0")
        if config.shots > len(smallest):
            raise DataError(
                f"few-shot needs {config.shots} solved examples, but the smallest sample has {len(smallest)}.",
                hint="lower shots.",
            )
        return sample_examples(smallest, config.shots, "shots")

    def check_digests(self, splits: Sequence[Split], stored: Mapping[str, str]) -> dict[str, str]:
        """The digests of some splits, which must be those that the study began with.

        Raises:
            DataError: A split has other examples than before: files may move, but runs on other data do not compare.
        """
        digests: dict[str, str] = {split: digest_examples(getattr(self, split)) for split in splits}
        changed = [split for split, digest in digests.items() if stored.get(split, digest) != digest]
        if changed:
            raise DataError(
                f"the {' and '.join(changed)} data is not what the study in {str(self.config.folder)!r} began with.",
                hint="give the same data, or choose another output.",
            )
        return digests


def count_targets(examples: Sequence[Example]) -> int:
    """The targets of all examples."""
    return sum(len(example.targets) for example in examples)


def sample_targets(examples: Sequence[Example], count: int, by: str, seed: str) -> list[Example]:
    """A sample of `count` targets with their sources; 0: all of them, as they are.

    Args:
        examples: To draw from.
        count: Targets wanted.
        by: `pairs` (of a source and one target) or `sources` (with all of their targets).
        seed: Any text.

    Raises:
        DataError: There are fewer.
    """
    available = count_targets(examples)
    if count > available:
        raise DataError(
            f"a sample of {count} targets was requested, but there are {available}.",
            hint="lower sizes, or use 0 for all.",
        )
    if not count:
        return list(examples)
    return (sample_pairs if by == "pairs" else sample_sources)(examples, count, seed)


def sample_pairs(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """`count` pairs of a source and one of its targets, drawn without replacement; in the set's order.

    >>> sample_pairs([Example("a", ("1", "2", "3")), Example("b", ("4",))], 4, "any")[0].targets
    ('1', '2', '3')
    """
    pairs = [(source, target) for source, example in enumerate(examples) for target in range(len(example.targets))]
    kept: dict[int, list[int]] = {}
    for source, target in sorted(random.Random(seed).sample(pairs, count)):
        kept.setdefault(source, []).append(target)
    return [
        dataclasses.replace(examples[source], targets=tuple(examples[source].targets[target] for target in targets))
        for source, targets in kept.items()
    ]


def sample_sources(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """Sources with all of their targets, drawn until there are `count` targets; the last may lose some."""
    order = list(range(len(examples)))
    random.Random(seed).shuffle(order)
    sample: list[Example] = []
    missing = count
    for index in order:
        example = examples[index]
        if missing <= 0:
            break
        if example.targets:
            sample.append(dataclasses.replace(example, targets=example.targets[:missing]))
            missing -= len(example.targets)
    return sample


def sample_examples(examples: Sequence[Example], count: int, seed: str) -> list[Example]:
    """`count` examples, whole, in the set's order; 0, or more than there are: all."""
    if not 0 < count < len(examples):
        return list(examples)
    return [examples[index] for index in sorted(random.Random(seed).sample(range(len(examples)), count))]


def digest_examples(examples: Sequence[Example]) -> str:
    """A short hash of sources and targets, the same wherever they were read from."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(json.dumps([example.source, *example.targets, *example.messages]).encode())
    return digest.hexdigest()[:16]
