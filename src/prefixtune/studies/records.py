"""Records."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.errors import DataError

__all__ = ["MAY_CHANGE", "Outcome"]


STUDY_FILE, CELL_FILE, COMPARISONS_FILE, ERROR_FILE = "study.json", "cell.json", "comparisons.json", "error.txt"
MAY_CHANGE = ("output", "budget", "keep_weights", "device", "data", "train", "dev", "test")

Event = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How far a study came.

    Attributes:
        folder: Where it is.
        done: Cells that are done.
        failed: Cell -> why it failed.
        left: Cells that were not run.
    """

    folder: Path
    done: tuple[str, ...]
    failed: dict[str, str]
    left: tuple[str, ...]


def read_json_file(path: Path, *keys: str) -> dict[str, Any]:
    """A JSON object that has some keys.

    Raises:
        DataError: It cannot be read, or is something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}.", hint="delete it, and run the study again.") from error
    missing = [key for key in keys if not isinstance(value, dict) or value.get(key) is None]
    if not isinstance(value, dict) or missing:
        what = f"has no {', '.join(missing)}" if missing else "is no JSON object"
        raise DataError(f"{path} {what}.", hint="delete it, and run the study again.")
    return value
