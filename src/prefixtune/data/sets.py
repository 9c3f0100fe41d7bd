"""The parts of a set in a folder, Parquet files, and sets of the `datasets` library.

Such a set is a folder that `save_to_disk` wrote, or an address:

    hub:OWNER/NAME[:CONFIGURATION][@SPLIT][#REVISION]

A set's split has an address of its own: `FOLDER/SPLIT`, or `hub:NAME@SPLIT`. A revision is a branch, a tag or a commit.
Sets that are Python scripts are not read; the hub has most of them as Parquet, in a branch of its own:
`hub:GEM/e2e_nlg@train#refs/convert/parquet`. Nothing is downloaded without `hub:`.

In any other folder a part is `SPLIT.jsonl`, `SPLIT.json`, ... (the formats that the task reads, each also `.gz`; for
`dev` also with the names `validation`, `valid` and `val`), or has a file name of the task's release.

Class numbers become class names. Dates, times and decimal numbers become texts, and so do bytes that are UTF-8; images,
sounds and the like stay bytes. The libraries are optional, and imported only when they are needed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from prefixtune.data.streams import reading
from prefixtune.errors import ConfigError, DataError, did_you_mean, first_line
from prefixtune.prefix.hub import HUB
from prefixtune.utils.extras import needs_extra

#: Split -> the names that it may have.
SPLITS: dict[str, tuple[str, ...]] = {
    "train": ("train",),
    "dev": ("dev", "validation", "valid", "val"),
    "test": ("test",),
}


Release = Mapping[str, Sequence[str]]
"""Split -> glob patterns for the names of its files in the task's release, with `/` between folders; a pattern that
ends with `/` means a folder of files."""
_DATASET_INFO, _DATASET_DICT = "dataset_info.json", "dataset_dict.json"
"""The files by which a folder of one split, or of several splits, is recognized."""
_BATCH = 100
"""Rows that are in memory at once; they may hold images."""


def is_dataset(path: Path | str) -> bool:
    """Whether a path names a set of the `datasets` library, not a file.

    >>> is_dataset("hub:GEM/e2e_nlg"), is_dataset("train.csv")
    (True, False)
    """
    return str(path).startswith(HUB) or any(
        os.path.isfile(os.path.join(path, name)) for name in (_DATASET_INFO, _DATASET_DICT)
    )


def dataset_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's location, for messages, and its values by column.

    Raises:
        ConfigError: The `datasets` library is not installed.
        DataError: The set cannot be found or read, has no rows, or has several splits; of a damaged one, raised when
            the row is reached.
    """
    if several := _splits(path):
        raise DataError(f"{path} has several splits: {', '.join(several)}; one is needed.", hint="name one of them.")
    data, number = _load(path), 0
    with _reporting(path):
        features = data.features or {}
        # In this format the library decodes nothing, and a format that the set was saved with does not count.
        rows = (row for batch in data.with_format("arrow").iter(_BATCH) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path}, row {number}", {name: _as_json(value, features.get(name)) for name, value in row.items()}
    if not number:
        raise DataError(f"{path} has no rows; at least one is needed.", hint="check how the set was made.")


def parquet_rows(file: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The location and the values of each row of a Parquet file.

    Args:
        file: Its bytes, to be read at any place.
        name: What messages call it.

    Raises:
        ConfigError: pyarrow is not installed.
        DataError: The file is not a complete Parquet file.
    """
    with needs_extra("datasets", f"{name}: reading Parquet", ", or export the table as JSON lines"):
        from pyarrow import parquet
    with _reporting(name):
        # Batch by batch, because all rows at once as Python objects take many times the file's size.
        batches = parquet.ParquetFile(file).iter_batches(batch_size=1024)
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            yield f"{name}, row {number}", {column: _as_json(value) for column, value in row.items()}


@contextlib.contextmanager
def _reporting(name: Path | str) -> Iterator[None]:
    """While the block runs, the libraries' errors, which are of many types, become one line that names the set."""
    try:
        yield
    except (ConfigError, DataError):
        raise
    except Exception as error:
        raise DataError(f"{name} cannot be read: {first_line(error)}", hint="check its name.") from error


def _as_json(value: Any, feature: Any = None) -> Any:
    """A value as in JSON, also within lists and objects.

    >>> from datetime import date
    >>> _as_json([date(2026, 1, 2), b"a", 1.5])
    ['2026-01-02', 'a', 1.5]

    Args:
        value: Any value of Arrow.
        feature: What `datasets` knows about it: names of classes, and that a text is JSON.
    """
    if isinstance(value, list | tuple):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_as_json(item, inner) for item in value]
    if isinstance(value, dict):
        features = feature if isinstance(feature, dict) else {}
        return {str(name): _as_json(item, features.get(name)) for name, item in value.items()}
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
        return value
    if isinstance(value, str) and type(feature).__name__ == "Json":
        return json.loads(value)
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None  # -1 means an unlabelled row
    return value if value is None or isinstance(value, str | bool | int | float) else str(value)


def _address(path: Path | str) -> tuple[str, str | None, str, str | None]:
    """The parts of an address of the hub: name, configuration, split (may be empty) and revision.

    >>> _address("hub:GEM/xsum:small@train#v1.0")
    ('GEM/xsum', 'small', 'train', 'v1.0')
    """
    address, _, revision = str(path).removeprefix(HUB).partition("#")
    address, _, split = address.partition("@")
    name, _, configuration = address.partition(":")
    return name, configuration or None, split, revision or None


def _splits(path: Path | str) -> list[str]:
    """The names of a set's splits; none for the address or the folder of one split. No rows are downloaded or read."""
    with _reporting(path):
        if not str(path).startswith(HUB):
            several = Path(path) / _DATASET_DICT
            return json.loads(several.read_text("utf-8"))["splits"] if several.is_file() else []
        with _needs_datasets():
            import datasets
        name, configuration, split, revision = _address(path)
        names = datasets.get_dataset_split_names(name, configuration, revision=revision)
        if split and split not in names:
            raise DataError(f"{HUB}{name} has no split {split!r}.", hint=f"it has: {', '.join(names)}.")
        return [] if split else names


def _load(path: Path | str) -> Any:
    """One split. One of the hub is read as it comes, without the others, and without a copy on the disk."""
    with _needs_datasets():
        import datasets
    with _reporting(path):
        if not str(path).startswith(HUB):
            return datasets.load_from_disk(str(path))
        name, configuration, split, revision = _address(path)
        return datasets.load_dataset(name, configuration, split=split, revision=revision, streaming=True)


def _needs_datasets() -> contextlib.AbstractContextManager[None]:
    return needs_extra("datasets", "this set", ", or export the set as JSON lines")


# --- folders ---------------------------------------------------------------------------------------------------------


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
        names = tuple(_splits(path))
        name, mark, revision = str(path).partition("#")
        of_hub = name.startswith(HUB)
        addresses = {one: Path(f"{name}@{one}{mark}{revision}" if of_hub else f"{path}/{one}") for one in names}
        if not names or (split is None and len(names) == 1):
            return addresses[names[0]] if names else path
        found = {one: addresses[name] for one, known in SPLITS.items() for name in reversed(known) if name in names}
    elif os.path.isdir(path):
        with reading(path):
            found = {name: match for name in SPLITS if (match := _find(path, name, formats, release))}
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


def _find(folder: Path, split: str, formats: Sequence[str], release: Release) -> Path | None:
    """The first match of the first pattern that has one, in the order of names; a folder only if it has a file."""
    named = [f"{name}{ending}{end}" for name in SPLITS[split] for ending in formats for end in ("", ".gz")]
    for pattern in (*named, *release.get(split, ())):
        for match in sorted(folder.glob(pattern.rstrip("/"))):
            if match.is_file() if not pattern.endswith("/") else any(inner.is_file() for inner in match.rglob("*")):
                return match
    return None
