"""The files of a run or a study, in a folder or packed in one JSON file."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import DataError

__all__ = ["WRITE_AGAIN", "Files"]


WRITE_AGAIN = "write it again with the command that made it."


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
        return cls(path, _json_object(_read_text(path), repr(str(path))) if path.is_file() else None)

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

    def json(self, name: str) -> dict[str, Any]:
        """A file with a JSON object.

        Raises:
            DataError: It cannot be read, or is something else.
        """
        path = self.path / name
        if self.packed is not None:
            return _checked_object(self.packed[name], repr(str(path)))
        return _json_object(_read_text(path), repr(str(path)))

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

    def json_lines(self, name: str, *, may_be_cut: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
        """The JSON objects of a file, one a line, each with where it is, for messages.

        Args:
            name: The file.
            may_be_cut: Ignore a last line that is not complete, as in a log that is still written.

        Raises:
            DataError: It cannot be read, or a line is something else.
        """
        path = self.path / name
        lines = _read_text(path).split("\n")
        for number, line in enumerate(lines, start=1):
            where = f"line {number} of {str(path)!r}"
            try:
                if line.strip():
                    yield where, _json_object(line, where, "remove the line, or the file.")
            except DataError:
                if not (may_be_cut and number == len(lines)):
                    raise


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {str(path)!r}: {error}.", hint="check the file.") from error


def _json_object(text: str, where: str, hint: str = WRITE_AGAIN) -> dict[str, Any]:
    try:
        return _checked_object(json.loads(text), where, hint)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {error}.", hint=hint) from error


def _checked_object(values: Any, where: str, hint: str = WRITE_AGAIN) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise DataError(f"{where} is {str(values)[:60]!r}, but must be an object.", hint=hint)
    return values
