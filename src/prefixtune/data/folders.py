"""Where a folder keeps its training, development and test set.

Looked for, in this order: `SPLIT.jsonl`, `SPLIT.json`, ... (the formats that the task reads, each also `.gz`; for `dev`
also under the names `validation`, `valid` and `val`), then the names of the task's release. A set of the `datasets`
library has its splits' names written down.

Knows nothing of what the files hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prefixtune.data.hub import dataset_splits, is_dataset, split_path
from prefixtune.errors import ConfigError, DataError, did_you_mean
from prefixtune.prefix.hub import HUB

__all__ = ["SPLITS", "locate"]


#: Split -> the names that it goes by.
SPLITS = {"train": ("train",), "dev": ("dev", "validation", "valid", "val"), "test": ("test",)}


def locate(path: Path, split: str | None, formats: Sequence[str], release: Mapping[str, Sequence[str]]) -> Path:
    """The file (or folder of files, or address) that holds a split; a file's path stays as it is.

    Args:
        path: A file, a folder, or a set of the `datasets` library.
        split: `train`, `dev` or `test`; None: the path is to hold one thing only.
        formats: The endings that the task reads.
        release: Split -> glob patterns for the names in the task's release, with `/` between folders. One that ends
            with `/` stands for a folder of files.

    Raises:
        ConfigError: The split is unknown.
        DataError: The folder has no such split, or has several and none was chosen.
    """
    if split is not None and split not in SPLITS:
        raise ConfigError(
            f"split is {split!r}, but must be one of {', '.join(SPLITS)}.", hint=did_you_mean(split, SPLITS)
        )
    if is_dataset(path):
        return _in_set(path, split)
    if not os.path.isdir(path):
        return path
    if split is None:
        return _only(path, formats, release)
    looked_for = list(_patterns(split, formats, release))
    for pattern in looked_for:
        if found := _first(path, pattern):
            return found
    known = _found(path, formats, release)
    raise DataError(
        f"{path} is a folder without a {split} set; looked for {', '.join(looked_for)}.",
        hint=f"it has: {', '.join(known)}." if known else "rename the file to one of these, or name the file itself.",
    )


def _in_set(path: Path, split: str | None) -> Path:
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


def _only(folder: Path, formats: Sequence[str], release: Mapping[str, Sequence[str]]) -> Path:
    """The folder itself, where its task reads a folder of files, and this one has no splits."""
    known = _found(folder, formats, release)
    if known:
        raise DataError(
            f"{folder} is a folder with the splits {', '.join(known)}; one of them is needed.",
            hint="name the split, or one file.",
        )
    whole = any(pattern.endswith("/") for patterns in release.values() for pattern in patterns)
    if not whole:
        raise DataError(f"{folder} is a folder; a file is needed.", hint="name one file in it.")
    return folder


def _found(folder: Path, formats: Sequence[str], release: Mapping[str, Sequence[str]]) -> list[str]:
    """The splits that a folder has."""
    return [split for split in SPLITS if any(_first(folder, p) for p in _patterns(split, formats, release))]


def _patterns(split: str, formats: Sequence[str], release: Mapping[str, Sequence[str]]) -> Iterator[str]:
    for name in SPLITS[split]:
        for ending in formats:
            yield from (f"{name}{ending}", f"{name}{ending}.gz")
    yield from release.get(split, ())


def _first(folder: Path, pattern: str) -> Path | None:
    """The first match of a pattern, in the order of names; a folder only where it holds a file."""
    for found in sorted(folder.glob(pattern.rstrip("/"))):
        if found.is_file() if not pattern.endswith("/") else any(inner.is_file() for inner in found.rglob("*")):
            return found
    return None
