"""Find the training, development and test set in a folder.

The search is for `SPLIT.jsonl`, `SPLIT.json`, ... (the formats that the task reads, each also `.gz`; for `dev` also
with the names `validation`, `valid` and `val`), then for the file names of the task's release. A set of the `datasets`
library lists the names of its splits.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from prefixtune.data.hub import dataset_splits, is_dataset, split_path
from prefixtune.errors import ConfigError, DataError, did_you_mean

#: Split -> the names that it may have.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


Release = Mapping[str, Sequence[str]]
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
    if split is not None and split not in SPLITS:
        raise ConfigError(
            f"split is {split!r}, but must be one of {', '.join(SPLITS)}.", hint=did_you_mean(split, SPLITS)
        )
    if is_dataset(path):
        return _locate_in_dataset(path, split)
    if not os.path.isdir(path):
        return path
    found = {name: match for name in SPLITS if (match := _find(path, list(_patterns(name, formats, release))))}
    if split in found:
        return found[split]
    hint = f"it has: {', '.join(found)}." if found else "name a file in it."
    if split is not None:
        patterns = ", ".join(_patterns(split, formats, release))
        raise DataError(f"{path} is a folder without a {split} set; looked for {patterns}.", hint=hint)
    reads_folders = any(pattern.endswith("/") for patterns in release.values() for pattern in patterns)
    if found or not reads_folders:
        raise DataError(f"{path} is a folder; a split or a file is needed.", hint=hint)
    return path


def _locate_in_dataset(path: Path, split: str | None) -> Path:
    names = dataset_splits(path)
    wanted = SPLITS[split] if split else names[:1] if len(names) == 1 else ()
    for name in wanted:
        if name in names:
            return split_path(path, name)
    if not names:
        return path
    what = f"no {split} set" if split else "several splits"
    raise DataError(f"{path} has {what}.", hint=f"it has: {', '.join(names)}.")


def _patterns(split: str, formats: Sequence[str], release: Release) -> Iterator[str]:
    for name in SPLITS[split]:
        for ending in formats:
            yield from (f"{name}{ending}", f"{name}{ending}.gz")
    yield from release.get(split, ())


def _find(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The first match of the first pattern that has one, in the order of names; a folder only if it has a file."""
    for pattern in patterns:
        for match in sorted(folder.glob(pattern.rstrip("/"))):
            if match.is_file() if not pattern.endswith("/") else any(inner.is_file() for inner in match.rglob("*")):
                return match
    return None
