"""Find the training, development and test set in a folder.

The search is for `SPLIT.jsonl`, `SPLIT.json`, ... (the formats that the task reads, each also `.gz`; for `dev` also
with the names `validation`, `valid` and `val`), then for the file names of the task's release. A set of the `datasets`
library lists the names of its splits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from prefixtune.data.hub import dataset_splits, is_dataset, split_path
from prefixtune.data.streams import reading
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
        raise ConfigError(f"there is no split {split!r}.", hint=did_you_mean(split, SPLITS))
    if is_dataset(path):
        names = dataset_splits(path)
        if not names or (split is None and len(names) == 1):
            return split_path(path, names[0]) if names else path
        found = {
            one: split_path(path, name) for one, known in SPLITS.items() for name in reversed(known) if name in names
        }
    elif os.path.isdir(path):
        with reading(path):
            found = {name: match for name in SPLITS if (match := _find(path, _patterns(name, formats, release)))}
        names = tuple(found)
        if split is None and not found and any(name.endswith("/") for names in release.values() for name in names):
            return path
    else:
        return path
    if split in found:
        return found[split]
    tried = f"no {split} set: no {', '.join([*SPLITS[split], *release.get(split, ())])}" if split else "several splits"
    hint = f"it has: {', '.join(names)}." if names else "name a file in it."
    raise DataError(f"{path} is a folder or a set with {tried}.", hint=hint)


def files_in(path: Path, formats: Sequence[str]) -> list[Path]:
    """The files at a path: itself, or all in a folder that a task reads, by name.

    Raises:
        DataError: The folder has none.
    """
    if is_dataset(path) or not os.path.isdir(path):
        return [path]
    endings = tuple(f"{ending}{zipped}" for ending in formats for zipped in ("", ".gz"))
    with reading(path):
        files = sorted(file for file in path.rglob("*") if file.name.lower().endswith(endings))
    if not files:
        raise DataError(f"{path} is a folder without files of {' or '.join(formats)}.", hint="name a file.")
    return files


def _patterns(split: str, formats: Sequence[str], release: Release) -> list[str]:
    named = [f"{name}{ending}{end}" for name in SPLITS[split] for ending in formats for end in ("", ".gz")]
    return [*named, *release.get(split, ())]


def _find(folder: Path, patterns: Sequence[str]) -> Path | None:
    """The first match of the first pattern that has one, in the order of names; a folder only if it has a file."""
    for pattern in patterns:
        for match in sorted(folder.glob(pattern.rstrip("/"))):
            if match.is_file() if not pattern.endswith("/") else any(inner.is_file() for inner in match.rglob("*")):
                return match
    return None
