"""The log of a job's run, on a disk that may be full for a while."""

from __future__ import annotations

from pathlib import Path

from prefixtune.utils.files import reporting_write_errors

__all__ = ["RunLog"]


class RunLog:
    """Appends lines to a file; those that cannot be written come later, in their order, so that none is missing.

    Args:
        path: The file, which is there; nobody else writes to it.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        self._waiting: list[str] = []

    def append(self, line: str) -> None:
        """Append a line, and those before it that could not be written.

        Raises:
            PrefixError: They cannot be written now, which is tried again with the next one.
        """
        self._waiting.append(line)
        self.flush()

    def flush(self) -> None:
        """Write what could not be written before.

        Raises:
            PrefixError: It cannot be written now either.
        """
        if not self._waiting:
            return
        data = "".join(f"{line}\n" for line in self._waiting).encode()
        with reporting_write_errors(self._path), open(self._path, "r+b") as file:
            # Without the part of a line that a full disk has cut off.
            file.truncate(self._size)
            file.seek(self._size)
            file.write(data)
        self._size += len(data)
        self._waiting.clear()
