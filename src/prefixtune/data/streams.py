"""The bytes and the text of a data file, piece by piece: gzip, byte order marks, encodings, standard input, pipes.

Only the piece that is read is in memory. Text is UTF-8, with or without a byte order mark, or UTF-16 with one.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import gzip
import io
import itertools
import os
import stat
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO

from prefixtune.errors import DataError, did_you_mean

__all__ = [
    "GZIP_MAGIC",
    "MAX_FILE_BYTES",
    "MAX_ROW_CHARS",
    "MAX_STREAM_BYTES",
    "STDIN",
    "check_exists",
    "decode",
    "empty_file",
    "is_stdin",
    "read_chunks",
    "read_text",
    "seekable_file",
    "shown",
    "text_lines",
    "text_pieces",
    "unpack",
]

MAX_FILE_BYTES = 2**32
"""Most bytes of a file that is read as a whole, after decompression."""
MAX_STREAM_BYTES = 2**40
"""Most bytes of a file that is read row by row, after decompression."""
MAX_ROW_CHARS = 2**26
"""Most characters of a line of JSON lines, and of a row of a table."""
GZIP_MAGIC = b"\x1f\x8b"
"""The first bytes of a gzip file."""
STDIN = "-"
"""The path that means standard input."""

_CHUNK = 2**20
_BYTE_ORDER_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
"""Byte order mark -> the encoding of the text after it; editors and spreadsheets on Windows write them."""


def is_stdin(path: Path | str) -> bool:
    """Whether a path means standard input.

    >>> is_stdin("-"), is_stdin(Path("-")), is_stdin("a-b.csv")
    (True, True, False)
    """
    return str(path) == STDIN


def shown(path: Path | str) -> str:
    """A path as messages show it."""
    return "stdin" if is_stdin(path) else str(path)


def read_chunks(path: Path, max_bytes: int | None = None) -> Iterator[bytes]:
    """A file's bytes, a megabyte at a time, decompressed if its name ends with `.gz` (or what is piped is gzipped).

    Args:
        path: The file, or `-`: standard input. This, and a pipe, is kept in a temporary file, to be read again.
        max_bytes: The most that it may hold, also decompressed; None: `MAX_STREAM_BYTES`.

    Raises:
        DataError: The file is missing, a folder, unreadable or too large, or not the gzip file that its name promises.
    """
    with contextlib.nullcontext(_spool(path)) if _is_read_once(path) else _open(path) as raw:
        raw.seek(0)
        magic = raw.read(len(GZIP_MAGIC))
        raw.seek(0)
        zipped = magic == GZIP_MAGIC
        _check_name(path, zipped)
        yield from unpack(raw.read, path, zipped=zipped, max_bytes=max_bytes)


def unpack(read: Callable[[int], bytes], path: Path, *, zipped: bool, max_bytes: int | None = None) -> Iterator[bytes]:
    """The bytes that a function reads, a megabyte at a time, decompressed if they are gzipped.

    Args:
        read: Returns at most as many bytes as it is asked for; none at the end.
        path: The file's, for messages.
        zipped: They are gzipped.
        max_bytes: As for `read_chunks`.

    Raises:
        DataError: They cannot be read, are too many, or are no gzip file.
    """
    try:
        if zipped:
            with gzip.GzipFile(fileobj=_Readable(read)) as unzipped:
                yield from _bounded(unzipped.read, path, max_bytes)
        else:
            yield from _bounded(read, path, max_bytes)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{shown(path)} is a broken gzip file: {error}.", hint="copy or download it again.") from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.") from error
    except OSError as error:
        raise _unreadable(path, error) from error


class _Readable(io.RawIOBase):
    """A function that reads, as the file that `gzip` needs."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes."""
        return self._read(size)


def _check_name(path: Path, zipped: bool) -> None:
    """Refuse a gzip file under another name, and the reverse; what is piped may have no name of its own."""
    if _is_read_once(path):
        return
    named = path.suffix.lower() == ".gz"
    if named and not zipped:
        raise DataError(
            f"{path} ends with .gz but is not a gzip file.",
            hint="remove .gz from its name, or compress it with `gzip`.",
        )
    if zipped and not named:
        raise DataError(f"{path} is gzipped, but its name does not end with .gz.", hint="add .gz to its name.")


def check_exists(path: Path) -> None:
    """Refuse a path where there is nothing.

    Raises:
        DataError: Nothing is there, or it may not be looked at.
    """
    try:
        os.stat(path)
    except FileNotFoundError as error:
        raise _missing(path) from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _open(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except FileNotFoundError as error:
        raise _missing(path) from error
    except IsADirectoryError as error:
        raise DataError(f"{path} is a folder; a file is needed.", hint="name one file in it.") from error
    except (OSError, ValueError) as error:  # a path with a NUL character is a ValueError
        raise _unreadable(path, error) from error


def _missing(path: Path) -> DataError:
    hint = did_you_mean(path.name, [item.name for item in path.parent.glob("*")])
    if not hint.startswith("did you mean"):
        hint = "check the path; a relative one starts at the current folder."
    return DataError(f"{path} does not exist.", hint=hint)


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = getattr(error, "strerror", None) or error
    return DataError(f"{shown(path)} cannot be read: {reason}.", hint="check its permissions.")


def _bounded(read: Callable[[int], bytes], path: Path, max_bytes: int | None) -> Iterator[bytes]:
    limit = MAX_STREAM_BYTES if max_bytes is None else max_bytes
    size = 0
    while piece := read(_CHUNK):
        size += len(piece)
        if size > limit:
            raise DataError(f"{shown(path)} holds more than {limit:,} bytes.", hint="split the file.")
        yield piece


_spooled: list[tuple[object, IO[bytes]]] = []
"""The standard input that was read last, if any, and the temporary file that keeps it."""
_spooled_pipes: dict[tuple[int, int], IO[bytes]] = {}
"""Device and inode of each pipe that was read -> the temporary file that keeps it."""


def _is_read_once(path: Path) -> bool:
    """Whether a path means standard input or a pipe: a named one, or `<(...)` of a shell."""
    try:
        return is_stdin(path) or stat.S_ISFIFO(os.stat(path).st_mode)
    except (OSError, ValueError):  # opening it says what is wrong
        return False


def _spool(path: Path) -> IO[bytes]:
    """What standard input or a pipe gave, in a temporary file, which is deleted when the program ends."""
    if is_stdin(path):
        return _stdin_spool()
    status = os.stat(path)
    pipe = status.st_dev, status.st_ino
    if pipe not in _spooled_pipes:
        with _open(path) as source:
            _spooled_pipes[pipe] = _copy(source.read, path)
    return _spooled_pipes[pipe]


def _stdin_spool() -> IO[bytes]:
    stream = sys.stdin
    if _spooled and _spooled[-1][0] is stream:
        return _spooled[-1][1]
    if stream is None or stream.isatty():
        raise DataError(
            "'-' means standard input, but nothing is piped into this command.",
            hint="write `... < FILE`, `cat FILE | ...`, or the file's name.",
        )
    # A program that runs this one within itself may replace standard input by a text.
    source = stream.buffer if hasattr(stream, "buffer") else io.BytesIO(stream.read().encode())
    spool = _copy(source.read, Path(STDIN))
    while _spooled:
        _spooled.pop()[1].close()
    _spooled.append((stream, spool))
    return spool


def _copy(read: Callable[[int], bytes], path: Path) -> IO[bytes]:
    """All bytes that a function reads, in a temporary file that lives as long as the program."""
    spool = tempfile.TemporaryFile()  # noqa: SIM115
    atexit.register(spool.close)
    try:
        for piece in _bounded(read, path, None):
            spool.write(piece)
    except OSError as error:
        raise DataError(
            f"{shown(path)} cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}.",
            hint="make room there, or set TMPDIR to another folder.",
        ) from error
    return spool


def seekable_file(path: Path) -> IO[bytes]:
    """A file to read at any place; what is gzipped or piped is copied to a temporary file, deleted when it is closed.

    Raises:
        DataError: As for `read_chunks`.
    """
    if not _is_read_once(path) and path.suffix.lower() != ".gz":
        return _open(path)
    spool = tempfile.TemporaryFile()  # noqa: SIM115  the caller closes it
    try:
        for piece in read_chunks(path):
            spool.write(piece)
    except BaseException:
        spool.close()
        raise
    spool.seek(0)
    return spool


def text_pieces(path: Path, max_bytes: int | None = None) -> Iterator[str]:
    """A file's text without a byte order mark, about a megabyte at a time.

    Raises:
        DataError: As for `read_chunks`; or it is neither UTF-8 nor UTF-16 with a byte order mark, or has a NUL
            character.
    """
    return decode(read_chunks(path, max_bytes), shown(path))


def decode(chunks: Iterator[bytes], name: str) -> Iterator[str]:
    """The text of some bytes, as `text_pieces` gives it; `name` is the file's, for messages."""
    first = next(chunks, b"")
    mark = next((mark for mark in _BYTE_ORDER_MARKS if first.startswith(mark)), b"")
    encoding = _BYTE_ORDER_MARKS.get(mark, "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    line = 1
    for chunk in itertools.chain([first[len(mark) :]], chunks, [b""]):
        try:
            piece = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line += error.object[: error.start].decode(encoding).count("\n")
            raise DataError(
                f"{name}, line {line}: byte 0x{error.object[error.start]:02x} is not {encoding.upper()}; "
                "only UTF-8 text is allowed.",
                hint="save it as UTF-8, or convert it, as in `iconv -f WINDOWS-1252 -t UTF-8`.",
            ) from error
        if "\0" in piece:
            raise DataError(
                f"{name}, line {line + piece.count(chr(10), 0, piece.index(chr(0)))}: there is a NUL character, as in "
                "files that are damaged or binary.",
                hint="write the file again, or remove the character.",
            )
        line += piece.count("\n")
        if piece:
            yield piece


def text_lines(pieces: Iterable[str], name: str, *, universal: bool = False) -> Iterator[str]:
    r"""The lines of a text, with their ends.

    >>> list(text_lines(["a\u2028b\nc", "d"], "x")), list(text_lines(["a\r", "\nb\rc"], "x", universal=True))
    (['a\u2028b\n', 'cd'], ['a\r\n', 'b\r', 'c'])

    Args:
        pieces: The text, in pieces.
        name: The file's, for messages.
        universal: Not only `\n` ends a line but also `\r` and `\r\n`.

    Raises:
        DataError: A line is longer than `MAX_ROW_CHARS`.
    """
    pending: list[str] = []
    size, number = 0, 1
    for piece in pieces:
        if pending and pending[-1].endswith("\r"):  # it may be half of an end
            piece, size = pending[-1] + piece, size - len(pending.pop())
        lines = _split(piece, universal)
        for line in lines[:-1]:
            yield "".join((*pending, line))
            pending.clear()
            size, number = 0, number + 1
        pending.append(lines[-1])
        size += len(lines[-1])
        if size > MAX_ROW_CHARS:
            raise DataError(
                f"{name}, line {number} has more than {MAX_ROW_CHARS:,} characters.", hint="split the row, or the file."
            )
    rest = "".join(pending)
    if rest:
        yield rest


def _split(text: str, universal: bool) -> list[str]:
    """The lines of a text, the last one without its end: empty if the text ends with one."""
    # Not str.splitlines: JSON strings and cells may contain other separators, such as U+2028.
    if not universal:
        *lines, last = text.split("\n")
        return [*(line + "\n" for line in lines), last]
    lines = list(io.StringIO(text, newline=""))
    if not lines or lines[-1].endswith("\n"):
        lines.append("")
    return lines


def read_text(path: Path, *, max_bytes: int | None = None, needed: str = "one row") -> str:
    """The whole text of a file, decompressed if its name ends with `.gz`, without a byte order mark.

    Args:
        path: The file.
        max_bytes: The most that it may hold, also decompressed; None: `MAX_FILE_BYTES`.
        needed: What an empty file lacks, for the message.

    Raises:
        DataError: The file is missing, a folder, unreadable, empty or too large; or it is not the gzip file that its
            name promises, or neither UTF-8 nor UTF-16 with a byte order mark.
    """
    text = "".join(text_pieces(path, MAX_FILE_BYTES if max_bytes is None else max_bytes))
    if not text.strip():
        raise empty_file(path, needed)
    return text


def empty_file(path: Path | str, needed: str = "one row") -> DataError:
    """The error of a file without anything but white space."""
    return DataError(f"{shown(path)} is empty; at least {needed} is needed.", hint="check that it is complete.")
