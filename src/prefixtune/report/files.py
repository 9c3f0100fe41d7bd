"""The files of a run or a study, in a folder or packed in one JSON file, and the checks of the JSON in them."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefixtune.errors import DataError

__all__ = ["Files", "Record", "finite", "wrong_value"]


T = TypeVar("T")
_KINDS: dict[type, str] = {str: "a string", int: "a whole number", bool: "true or false", dict: "an object"}
_KINDS[list] = "a list"
_WRITE_AGAIN = "write it again with the command that made it."


class Record:
    """A JSON object whose values are checked as they are read.

    Args:
        values: The object.
        where: Where it is, for messages.

    Raises:
        DataError: It is not an object; and from every method, a value is of another type.
    """

    def __init__(self, values: object, where: str) -> None:
        if not isinstance(values, Mapping):
            raise wrong_value(where, values, "an object")
        self.values, self.where = values, where

    def get(self, key: str, kind: type[T], default: T) -> T:
        """A value of one type; null counts as missing."""
        value = self.values.get(key)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise wrong_value(f"{key!r} in {self.where}", value, _KINDS[kind])
        return value

    def number(self, key: str) -> float | None:
        """A number; None where it is missing or not finite."""
        return finite(self.values.get(key), f"{key!r} in {self.where}")

    def numbers(self, key: str) -> list[float | None]:
        """A list of numbers; None for those that are missing or not finite."""
        return [finite(value, f"{key!r} in {self.where}") for value in self.get(key, list, [])]

    def record(self, key: str) -> Record:
        """An object inside."""
        return Record(self.get(key, dict, {}), f"{key!r} in {self.where}")

    def records(self) -> Iterator[tuple[str, Record]]:
        """Every value, which must be an object."""
        for key, value in self.values.items():
            yield key, Record(value, f"{key!r} in {self.where}")

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.get(key, list, [])
        if not all(isinstance(value, str) for value in values):
            raise wrong_value(f"{key!r} in {self.where}", values, "a list of strings")
        return tuple(values)


def wrong_value(where: str, value: object, allowed: str) -> DataError:
    """The error for a value in a file that is not what it must be."""
    return DataError(f"{where} is {str(value)[:60]!r}, but must be {allowed}.", hint=_WRITE_AGAIN)


def finite(value: object, where: str) -> float | None:
    """A number; None where it is missing or not finite.

    Raises:
        DataError: It is not a number.
    """
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise wrong_value(where, value, "a number")
    return float(value) if math.isfinite(value) else None


@dataclass(frozen=True)
class Files:
    """The files of a run or a study.

    Attributes:
        path: Their folder.
        packed: Their contents by their paths within it, where they are not in a folder but in one JSON file.
    """

    path: Path
    packed: Mapping[str, Any] | None = None

    @classmethod
    def open(cls, path: Path) -> Files:
        """A folder, or a JSON file with the contents of the JSON files of one: `{"cells/ID/cell.json": {...}, ...}`.

        Raises:
            DataError: The file cannot be read, or is something else.
        """
        return cls(path, _parse_json(path).values if path.is_file() else None)

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return (self.path / name).is_file() if self.packed is None else name in self.packed

    def folders(self, name: str) -> list[Files]:
        """The folders within a folder, by name."""
        if self.packed is None:
            return [Files(folder) for folder in sorted((self.path / name).glob("*")) if folder.is_dir()]
        inside: dict[str, dict[str, Any]] = {}
        for key, content in self.packed.items():
            top, _, rest = key.partition("/")
            folder, _, file = rest.partition("/")
            if top == name and file:
                inside.setdefault(folder, {})[file] = content
        return [Files(self.path / name / folder, inside[folder]) for folder in sorted(inside)]

    def size(self, name: str) -> int:
        """A file's bytes."""
        return (self.path / name).stat().st_size

    def json(self, name: str) -> Record:
        """A file with a JSON object.

        Raises:
            DataError: It cannot be read, or is something else.
        """
        path = self.path / name
        return _parse_json(path) if self.packed is None else Record(self.packed[name], repr(str(path)))

    def toml(self, name: str) -> dict[str, Any]:
        """A TOML file.

        Raises:
            DataError: It cannot be read, or is something else.
        """
        path = self.path / name
        try:
            return tomllib.loads(_read_text(path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{str(path)!r} is not TOML: {error}.", hint="correct the line.") from error

    def json_lines(self, name: str, *, may_be_cut: bool = False) -> Iterator[Record]:
        """The JSON objects of a file, one a line.

        Args:
            name: The file.
            may_be_cut: Ignore a last line that is not complete, as in a log that is still written.

        Raises:
            DataError: It cannot be read, or a line is something else.
        """
        path = self.path / name
        lines = _read_text(path).split("\n")
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"line {number} of {str(path)!r}"
            try:
                yield Record(json.loads(line), where)
            except (ValueError, RecursionError) as error:
                if may_be_cut and number == len(lines):
                    return
                raise DataError(f"{where} is not JSON: {error}.", hint="remove the line, or the file.") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint="check the file.") from error


def _parse_json(path: Path) -> Record:
    try:
        return Record(json.loads(_read_text(path)), repr(str(path)))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{str(path)!r} is not JSON: {error}.", hint=_WRITE_AGAIN) from error
