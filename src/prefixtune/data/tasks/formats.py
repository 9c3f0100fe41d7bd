"""Which format the data of a task has that also reads files of its own, such as XML, and not rows alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from prefixtune.data.files import check_file, file_format, recognize_format
from prefixtune.data.hub import is_dataset
from prefixtune.data.streams import is_stdin, read_chunks

__all__ = ["task_format"]


def task_format(path: Path, formats: Sequence[str], own: str) -> str:
    """The format of a file by its ending, and of standard input by its beginning; empty: a set of the hub's library.

    Args:
        path: The file; `-`: standard input; or a set of the `datasets` library.
        formats: The endings that the task reads.
        own: The format of standard input that is neither JSON nor Parquet.

    Raises:
        DataError: It is a folder, cannot be read, or has another ending.
    """
    if is_dataset(path):
        return ""
    if is_stdin(path):
        return recognize_format(next(read_chunks(path), b"")) or own
    check_file(path)
    return file_format(path, formats)
