"""The bytes and lines of a data file: plain or gzipped, from the disk or standard input. Text is UTF-8."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast

from prefixtune.errors import DataError, did_you_mean

MAX_FILE_BYTES = 2**30
"""Most bytes of what is read as a whole, after decompression: standard input, a JSON list, XML, a text."""
MAX_LINE_BYTES = 2**23
"""Most bytes of a line."""
GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
STDIN = "-"
"""The path that means standard input."""

_piped: dict[object, bytes] = {}
"""What was read of standard input, by its stream: it can be read once."""


def is_stdin(path: Path | str) -> bool:
    """Whether a path means standard input.

    >>> is_stdin("-"), is_stdin(Path("-")), is_stdin("a-b.csv")
    (True, True, False)
    """
    return str(path) == STDIN


def shown(path: Path | str) -> str:
    """A path as messages show it."""
    return "stdin" if is_stdin(path) else str(path)


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """While the block runs, errors of reading a file become one line that names it.

    Raises:
        DataError: The file is missing, a folder, unreadable or no gzip file.
    """
    try:
        yield
    except FileNotFoundError as error:
        hint = did_you_mean(path.name, [item.name for item in path.parent.glob("*")])
        raise DataError(
            f"{path} does not exist.", hint=hint if hint.startswith("did you mean") else "check the path."
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{shown(path)} is a broken gzip file: {error}.", hint="copy or download it again.") from error
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{shown(path)} cannot be read: {reason}.", hint="name a file that you may read.") from error


def open_bytes(path: Path) -> IO[bytes]:
    """A file's bytes, decompressed if its name ends with `.gz` (or what is piped is gzipped).

    What is piped is kept in memory: the form of data is recognized before they are read. To be used within `reading`.
    """
    if not is_stdin(path):
        return cast(IO[bytes], gzip.open(path)) if path.suffix.lower() == ".gz" else open(path, "rb")
    if sys.stdin not in _piped:
        _piped[sys.stdin] = read_bytes(_stdin(), shown(path))
    file = io.BytesIO(_piped[sys.stdin])
    return cast(IO[bytes], gzip.open(file)) if _piped[sys.stdin].startswith(GZIP_MAGIC) else file


def _stdin() -> IO[bytes]:
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("nothing is piped into this command.", hint="write `... < FILE`, or name the file.")
    # A program that runs this one within itself may replace standard input by a text.
    return getattr(sys.stdin, "buffer", None) or io.BytesIO(sys.stdin.read().encode())


def read_bytes(file: IO[bytes], name: str, max_bytes: int | None = None) -> bytes:
    """All bytes of an open file.

    Raises:
        DataError: There are more than `max_bytes`; None: than `MAX_FILE_BYTES`.
    """
    limit = MAX_FILE_BYTES if max_bytes is None else max_bytes
    data = file.read(limit + 1)
    if len(data) > limit:
        what = f"{name} holds more than {limit:,} bytes."
        raise DataError(what, hint="split it, or use a file of JSON lines.")
    return data


def text_lines(file: IO[bytes], name: str) -> Iterator[str]:
    r"""The lines of a file, with their ends; only `\n` ends one.

    >>> list(text_lines(io.BytesIO("a\u2028b\r\nc".encode()), "x"))
    ['a\u2028b\r\n', 'c']

    Args:
        file: Its bytes.
        name: What messages call it.

    Raises:
        DataError: A line is longer than `MAX_LINE_BYTES`, or is not UTF-8.
    """
    for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES + 1), b""), start=1):
        if len(line) > MAX_LINE_BYTES:
            raise DataError(f"{name}, line {number} has more than {MAX_LINE_BYTES:,} bytes.", hint="split the row.")
        yield _decode(line, name, number)


def read_text(path: Path, *, max_bytes: int | None = None, needed: str = "one row") -> str:
    """The whole text of a file, decompressed if its name ends with `.gz`, without a byte order mark.

    Args:
        path: The file.
        max_bytes: The most that it may hold, also decompressed; None: `MAX_FILE_BYTES`.
        needed: What an empty file lacks, for the message.

    Raises:
        DataError: The file is missing, a folder, unreadable, empty, too large or not UTF-8.
    """
    with reading(path), open_bytes(path) as file:
        text = whole_text(file, shown(path), max_bytes)
    if not text.strip():
        raise DataError(f"{shown(path)} is empty; at least {needed} is needed.", hint="check that it is complete.")
    return text


def whole_text(file: IO[bytes], name: str, max_bytes: int | None = None) -> str:
    """The text of an open file.

    Raises:
        DataError: It holds more than `max_bytes`, or is not UTF-8.
    """
    return _decode(read_bytes(file, name, max_bytes), name, 1)


def _decode(data: bytes, name: str, line: int) -> str:
    """The text of some lines, the first of which has this number; in the first of a file, without a byte order mark."""
    data = data.removeprefix(codecs.BOM_UTF8) if line == 1 else data
    try:
        text = data.decode("utf-8")
        place = data.find(b"\0")  # as in files that are damaged, binary or UTF-16
    except UnicodeDecodeError as error:
        place = error.start
    if place < 0:
        return text
    line += data.count(b"\n", 0, place)
    raise DataError(f"{name}, line {line}: byte 0x{data[place]:02x} is not UTF-8.", hint="save the file as UTF-8.")
