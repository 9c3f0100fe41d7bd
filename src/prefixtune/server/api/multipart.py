"""A form with one file (`multipart/form-data`), read as it arrives: only a piece of it is in memory."""

from __future__ import annotations

import logging
from collections.abc import Collection
from typing import Protocol, runtime_checkable

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from prefixtune.errors import did_you_mean
from prefixtune.server.responses import ApiError, bad_request

__all__ = ["FORM_OVERHEAD", "FormReader", "FormTarget"]


FORM_OVERHEAD = 2**16
"""Bytes that a form may have besides its file."""
# It would write a line on whatever anybody sends; whoever sent it is told.
logging.getLogger("python_multipart").setLevel(logging.CRITICAL)
_MAX_PARTS = 16
_MIN_BOUNDARY, _MAX_BOUNDARY = 8, 70
"""Longer ones are not allowed; shorter ones, which no usual client sends, take long to tell from the file."""
_MAX_HEADER_BYTES = 2**13
"""Of one part, all headers together."""
_MAX_FIELD_BYTES = 2**10


@runtime_checkable
class FormTarget(Protocol):
    """Takes what is in a form, in its order."""

    def take_field(self, name: str, text: str) -> None:
        """A field and its text."""

    def begin_file(self, filename: str) -> None:
        """The file begins."""

    def write(self, data: bytes) -> None:
        """A piece of the file."""


class FormReader:
    """Reads a form with fields and one file.

    Args:
        request: Its content type names what separates the parts.
        fields: Names of the fields that the form may have.
        file: Name of the field with the file.
        target: Takes the fields and the file.

    Raises:
        ApiError: The body is no form.
    """

    def __init__(
        self,
        request: Request,
        fields: Collection[str],
        file: str,
        target: FormTarget,
    ) -> None:
        self._fields, self._file, self._target = fields, file, target
        self._seen: set[str] = set()
        self._parts = self._header_bytes = 0
        self._header_name = self._header_value = b""
        self._disposition = b""
        self._name = ""
        self._text: bytearray | None = None
        self._has_file = self._is_complete = False
        self._parser = MultipartParser(
            _boundary(request),
            {
                "on_part_begin": self._begin_part,
                "on_header_field": self._add_header_name,
                "on_header_value": self._add_header_value,
                "on_header_end": self._end_header,
                "on_headers_finished": self._end_headers,
                "on_part_data": self._add_data,
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Read a piece of the body.

        Raises:
            ApiError: It is wrong.
        """
        try:
            self._parser.write(chunk)
        except FormParserError:
            raise bad_request("the body is not a form that its content type describes.", code="invalid_form") from None

    def close(self) -> None:
        """The body has ended.

        Raises:
            ApiError: A part of it or the file is missing.
        """
        if not self._is_complete:
            raise bad_request("the body ends before the form does.", code="invalid_form")
        if not self._has_file:
            raise bad_request(f"the field {self._file!r} with the file is missing.", self._file)

    # --- what the parser finds ---------------------------------------------------------------------------------------

    def _begin_part(self) -> None:
        self._parts += 1
        if self._parts > _MAX_PARTS:
            raise bad_request(f"the form has more than {_MAX_PARTS} fields.", code="invalid_form")
        self._header_bytes, self._disposition = 0, b""
        self._header_name = self._header_value = b""

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _MAX_HEADER_BYTES:
            message = f"a part of the form has more than {_MAX_HEADER_BYTES:,} bytes of headers."
            raise bad_request(message, code="invalid_form")

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        # Also an empty header takes time.
        self._count(4)
        if self._header_name.strip().lower() == b"content-disposition":
            self._disposition = self._header_value
        self._header_name = self._header_value = b""

    def _end_headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name")
        if kind != b"form-data" or name is None:
            raise bad_request("a part of the form has no name.", code="invalid_form")
        self._name = name.decode("utf-8", "replace")[:200]
        if self._name == self._file:
            if self._has_file:
                raise bad_request("the form has two files; only one is taken at once.", self._file)
            if b"filename" not in options:
                raise bad_request(f"the field {self._file!r} must be a file, with a file name.", self._file)
            self._has_file, self._text = True, None
            self._target.begin_file(options[b"filename"].decode("utf-8", "replace"))
            return
        if self._name not in self._fields:
            hint = did_you_mean(self._name, [*self._fields, self._file])
            raise bad_request(f"there is no field {self._name!r}.", self._name, "unknown_field", hint=hint)
        if self._name in self._seen:
            raise bad_request(f"the field {self._name!r} is there twice.", self._name)
        self._seen.add(self._name)
        self._text = bytearray()

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        if self._text is None:
            self._target.write(data[start:end])
            return
        self._text += data[start:end]
        if len(self._text) > _MAX_FIELD_BYTES:
            raise bad_request(f"the field {self._name!r} has more than {_MAX_FIELD_BYTES:,} bytes.", self._name)

    def _end_part(self) -> None:
        if self._text is not None:
            self._target.take_field(self._name, self._text.decode("utf-8", "replace"))

    def _end(self) -> None:
        self._is_complete = True


def _boundary(request: Request) -> bytes:
    """What separates the parts.

    Raises:
        ApiError: The content type is another one, or names none.
    """
    kind, options = parse_options_header(request.headers.get("content-type", "")[:1000])
    if kind != b"multipart/form-data":
        message = f"the content type is {kind.decode('utf-8', 'replace')[:80]!r}, but must be multipart/form-data."
        raise ApiError(415, message, code="unsupported_media_type")
    boundary = options.get(b"boundary", b"")
    if not _MIN_BOUNDARY <= len(boundary) <= _MAX_BOUNDARY:
        message = f"the content type names no boundary of {_MIN_BOUNDARY} to {_MAX_BOUNDARY} characters."
        raise bad_request(message, code="invalid_form")
    return boundary
