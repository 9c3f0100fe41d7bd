"""Find the training, development and test set in a folder.

The search is for `SPLIT.jsonl`, `SPLIT.json`, ... (the formats that the task reads, each also `.gz`; for `dev` also
with the names `validation`, `valid` and `val`), then for the file names of the task's release. A set of the `datasets`
library lists the names of its splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import get_args

from prefixtune.data.examples import SplitName
from prefixtune.data.hub import dataset_splits, is_dataset, split_path
from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.prefix.hub import HUB

__all__ = ["SPLITS", "locate"]


#: Split -> the names that it may have.
SPLITS: dict[SplitName, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


Release = Mapping[SplitName, Sequence[str]]
"""Split -> glob patterns for the names of its files in the task's release, with `/` between folders; a pattern that
ends with `/` means a folder of files."""


def locate(path: Path, split: str | None, formats: Sequence[str], release: Release) -> Path:
    """The file (or folder of files, or address) of a split; the path of a file is returned as it is.

    Args:
        path: A file, a folder, or a set of the `datasets` library.
        split: `train`, `dev` or `test`; None: the path may not have several splits.
        formats: The file endings that the task reads.
        release: The names of the files in the task's release.

    Raises:
        ConfigError: The split is unknown.
        DataError: The folder has no such split, or has several and none was named.
    """
    chosen = None if split is None else _as_split(split)
    if is_dataset(path):
        return _locate_in_dataset(path, chosen)
    if not os.path.isdir(path):
        return path
    if chosen is None:
        return _locate_single(path, formats, release)
    patterns = list(_patterns(chosen, formats, release))
    for pattern in patterns:
        if match := _first_match(path, pattern):
            return match
    try:
        os.scandir(path).close()
    except OSError as error:
        raise DataError(
            f"the folder {path} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error
    existing = _existing_splits(path, formats, release)
    raise DataError(
        f"{path} is a folder without a {chosen} set; looked for {', '.join(patterns)}.",
        hint=f"it has: {', '.join(existing)}."
        if existing
        else "rename the file to one of these, or name the file itself.",
    )


def _as_split(name: str) -> SplitName:
    for split in get_args(SplitName):
        if name == split:
            chosen: SplitName = split
            return chosen
    raise ConfigError(f"split is {name!r}, but must be one of {', '.join(SPLITS)}.", hint=did_you_mean(name, SPLITS))


def _locate_in_dataset(path: Path, split: SplitName | None) -> Path:
    names = dataset_splits(path)
    if not names:
        return path
    if split is None:
        if len(names) == 1:
            return split_path(path, names[0])
        example = "" if str(path).startswith(HUB) else f", or the folder {split_path(path, names[0])}"
        raise DataError(
            f"{path} has several splits: {', '.join(names)}; one is needed.", hint=f"name the split{example}."
        )
    for name in SPLITS[split]:
        if name in names:
            return split_path(path, name)
    raise DataError(
        f"{path} has no {split} set; looked for the splits {', '.join(SPLITS[split])}.",
        hint=f"it has: {', '.join(names)}.",
    )


def _locate_single(folder: Path, formats: Sequence[str], release: Release) -> Path:
    """The folder itself, if its task reads a folder of files and this one has no splits."""
    existing = _existing_splits(folder, formats, release)
    if existing:
        raise DataError(
            f"{folder} is a folder with the splits {', '.join(existing)}; one of them is needed.",
            hint="name the split, or one file.",
        )
    reads_folders = any(pattern.endswith("/") for patterns in release.values() for pattern in patterns)
    if not reads_folders:
        raise DataError(f"{folder} is a folder; a file is needed.", hint="name one file in it.")
    return folder


def _existing_splits(folder: Path, formats: Sequence[str], release: Release) -> list[str]:
    """The splits that a folder has."""
    return [
        split
        for split in SPLITS
        if any(_first_match(folder, pattern) for pattern in _patterns(split, formats, release))
    ]


def _patterns(split: SplitName, formats: Sequence[str], release: Release) -> Iterator[str]:
    for name in SPLITS[split]:
        for ending in formats:
            yield from (f"{name}{ending}", f"{name}{ending}.gz")
    yield from release.get(split, ())


def _first_match(folder: Path, pattern: str) -> Path | None:
    """The first match of a pattern, in the order of names; a folder only if it has a file."""
    for match in sorted(folder.glob(pattern.rstrip("/"))):
        if match.is_file() if not pattern.endswith("/") else any(inner.is_file() for inner in match.rglob("*")):
            return match
    return None
