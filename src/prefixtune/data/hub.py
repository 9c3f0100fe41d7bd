"""Data sets of the `datasets` library: a folder that `save_to_disk` wrote, or a set on the hub, named `hub:NAME`.

    hub:OWNER/NAME[:CONFIGURATION][@SPLIT][#REVISION]

A set's split has an address of its own: `FOLDER/SPLIT`, or `hub:NAME@SPLIT`. A revision is a branch, a tag or a commit.
Sets that are Python scripts are not read; the hub has most of them as Parquet, in a branch of its own:
`hub:GEM/e2e_nlg@train#refs/convert/parquet`. Nothing is downloaded without `hub:`.

Class numbers become class names, and other values are as in Parquet. Images, sounds and the like stay bytes. The
library is optional, and imported only when a set is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefixtune.data.values import as_json
from prefixtune.errors import ConfigError, DataError, first_line
from prefixtune.prefix.hub import HUB
from prefixtune.utils.extras import needs_extra

__all__ = ["HUB", "dataset_rows", "dataset_splits", "is_dataset", "split_path"]


_DATASET_INFO, _DATASET_DICT = "dataset_info.json", "dataset_dict.json"
"""The files by which a folder of one split, or of several splits, is recognized."""
_CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps a set as Parquet."""
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


def dataset_splits(path: Path | str) -> tuple[str, ...]:
    """The names of a set's splits; none if the path is already one split.

    Raises:
        ConfigError: The `datasets` library is needed and not installed.
        DataError: The set cannot be found or read.
    """
    if str(path).startswith(HUB):
        name, configuration, split, revision = _address(str(path))
        return () if split else tuple(_load_from_hub(name, configuration, revision))
    if os.path.isfile(os.path.join(path, _DATASET_INFO)):
        return ()
    try:
        names = json.loads((Path(path) / _DATASET_DICT).read_text(encoding="utf-8"))["splits"]
        return tuple(map(str, names))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(
            f"{Path(path) / _DATASET_DICT} cannot be read: {error}.", hint="save the set again with save_to_disk."
        ) from error


def split_path(path: Path | str, split: str) -> Path:
    """The address of one split.

    >>> split_path("hub:GEM/e2e_nlg", "test").as_posix()
    'hub:GEM/e2e_nlg@test'
    >>> split_path("hub:GEM/e2e_nlg#v1", "test").as_posix()
    'hub:GEM/e2e_nlg@test#v1'

    Raises:
        DataError: The split's folder is missing.
    """
    if str(path).startswith(HUB):
        name, mark, revision = str(path).partition("#")
        return Path(f"{name}@{split}{mark}{revision}")
    if not is_dataset(folder := Path(path) / split):
        raise DataError(
            f"{path} names the split {split!r}, but {folder} is not a folder of a saved set.",
            hint="copy the whole folder again, or save the set again with save_to_disk.",
        )
    return folder


def dataset_rows(path: Path | str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each row's location, for messages, and its values by column.

    Raises:
        ConfigError: The `datasets` library is not installed.
        DataError: The set cannot be found or read, has no rows, or has several splits; of a damaged one, raised when
            the row is reached.
    """
    if splits := dataset_splits(path):
        raise DataError(
            f"{path} has {len(splits)} splits: {', '.join(splits)}; one is needed.",
            hint=f"name one, as in {split_path(path, splits[0]).as_posix()}.",
        )
    if str(path).startswith(HUB):
        name, configuration, split, revision = _address(str(path))
        splits_by_name = _load_from_hub(name, configuration, revision)
        if split not in splits_by_name:
            raise DataError(f"{HUB}{name} has no split {split!r}.", hint=f"it has: {', '.join(splits_by_name)}.")
        data = splits_by_name[split]
    else:
        data = _load_from_disk(path)
    if not len(data):
        raise DataError(f"{path} has no rows; at least one is needed.", hint="check how the set was made.")
    try:
        for number, values in enumerate(_rows(data), start=1):
            yield f"{path}, row {number}", values
    except Exception as error:  # the library raises many types
        raise _unreadable(path, error) from error


def _rows(data: Any) -> Iterator[dict[str, Any]]:
    """The values of each row by column, as JSON values where possible."""
    features = type(data.features)({column: _without_media(feature) for column, feature in data.features.items()})
    # In this format the library decodes nothing, and a format that the set was saved with does not count.
    for batch in data.with_format("arrow").iter(_BATCH):
        for row in batch.to_pylist():
            values = features.decode_example(row)
            yield {column: as_json(_with_class_names(features[column], value)) for column, value in values.items()}


def _without_media(feature: Any) -> Any:
    """A column's type, in which images, sounds and the like are not decoded: nothing reads them."""
    if isinstance(feature, dict):
        return {name: _without_media(inner) for name, inner in feature.items()}
    if isinstance(feature, list):
        return [_without_media(inner) for inner in feature]
    if hasattr(feature, "feature"):
        return dataclasses.replace(feature, feature=_without_media(feature.feature))
    # The library's type of JSON is decoded too, but to values.
    if getattr(feature, "decode", False) and type(feature).__name__ != "Json":
        return dataclasses.replace(feature, decode=False)
    return feature


def _address(path: str) -> tuple[str, str | None, str | None, str | None]:
    """The parts of `hub:NAME[:CONFIGURATION][@SPLIT][#REVISION]`."""
    address, _, revision = path.removeprefix(HUB).partition("#")
    rest, _, split = address.partition("@")
    name, _, configuration = rest.partition(":")
    if not name.strip("/ "):
        raise ConfigError(f"{path!r} names no set.", hint="write hub:OWNER/NAME, as in hub:EdinburghNLP/xsum.")
    return name, configuration or None, split or None, revision or None


def _library() -> Any:
    with needs_extra("datasets", "this set", ", or export the set as JSON lines"):
        import datasets
    return datasets


def _load_from_disk(path: Path | str) -> Any:
    library = _library()
    try:
        return library.load_from_disk(str(path))
    except Exception as error:  # the library raises many types, also pyarrow's
        if isinstance(error, IndexError) and not list(Path(path).glob("*.arrow")):
            return []  # saved without rows, which the library cannot read
        raise _unreadable(path, error) from error


def _unreadable(path: Path | str, error: Exception) -> DataError:
    is_on_hub = str(path).startswith(HUB)
    return DataError(
        f"{path} cannot be read as a set of the datasets library: {first_line(error).rstrip('.')}.",
        hint="download it again, or export it as JSON lines."
        if is_on_hub
        else "copy the whole folder again, or save the set again with save_to_disk.",
    )


def _load_from_hub(name: str, configuration: str | None, revision: str | None) -> Any:
    library = _library()
    try:
        return library.load_dataset(name, configuration, revision=revision)
    except Exception as error:  # as above, also the network's
        address = f"{HUB}{name}{f':{configuration}' if configuration else ''}"
        if "scripts are no longer supported" in str(error):
            hint = (
                f"name the branch in which the hub has most sets as Parquet, as in {HUB}{name}#{_CONVERTED}; or export "
                "the set as JSON lines."
            )
        else:
            hint = (
                "check the name (with its configuration and revision, hub:OWNER/NAME:CONFIGURATION#REVISION) and the "
                "network."
            )
        raise DataError(
            f"{address}{f'#{revision}' if revision else ''} cannot be loaded: {first_line(error).rstrip('.')}.",
            hint=hint,
        ) from error


def _with_class_names(feature: Any, value: Any) -> Any:
    """A value with class names instead of class numbers, alone or in a list."""
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_with_class_names(inner, item) for item in value]
    if isinstance(value, int) and hasattr(feature, "int2str"):
        return feature.int2str(value) if value >= 0 else None  # -1 means an unlabelled row
    return value
