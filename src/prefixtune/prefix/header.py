"""The header of a file: its fields, and its JSON, which may come from anybody; `docs/format.md` has all of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json

from prefixtune.errors import CheckpointError, short_repr
from prefixtune.prefix.text_format import read_text_format

FORMAT_VERSION = 2
"""Of files that are written and read."""
HEADER_BYTES = 2**20
"""Longest header that is read or written, in the bytes of the file; an ordinary one has a few thousand."""
_RESERVE = 2**12
"""Bytes that a header may grow by while its prefix is trained."""
_AGAIN = "get the file again."

_Texts = list[str] | tuple[str, ...]


class _Part(BaseModel):
    """A part of a header: fields that are not listed are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


class BackboneOrigin(_Part):
    """The model that a prefix was trained for; an empty text: unknown.

    Attributes:
        name: A hub id, or a folder's path.
        fingerprint: Of its shape and some of its weights.
        kind: Where the header names none, as of most other programs' prefixes, a decoder.
    """

    name: str = ""
    fingerprint: str = ""
    kind: str = "decoder"


class JobOrigin(_Part):
    """The job that made a prefix for somebody who asked a server for it.

    Attributes:
        id: The job's.
        owner: Who asked: only they and admins see the prefix.
        step: Of a checkpoint, after how many steps; None: it is the job's result.
    """

    id: str = Field(min_length=1)
    owner: str = Field(min_length=1)
    step: int | None = None


class _Labels(_Part):
    kind: Literal["classification", "tagging"]
    by: Literal["head", "words"]
    names: _Texts = Field(min_length=2)
    words: _Texts = ()

    @model_validator(mode="after")
    def _check_words(self) -> _Labels:
        if self.by == "words" and (len(self.words) != len(self.names) or self.kind == "tagging"):
            raise ValueError("each name has one word, and tags have none")
        return self


class Header(_Part):
    """The fields of a header that are read elsewhere; `docs/format.md` has all."""

    adapter: str = ""
    backbone: BackboneOrigin = BackboneOrigin()
    composition: dict[str, Any] = {}
    description: str = ""
    form: str = ""
    initialization: dict[str, Any] = {}
    job: JobOrigin | None = None
    labels: _Labels | None = None
    license: str = ""
    made_with: dict[str, Any] = {}
    method: str = ""
    peft: dict[str, Any] = {}
    placement: Literal["front"] = "front"
    questions: list[Annotated[list[str], Field(min_length=2, max_length=2)]] = []
    rotation: dict[str, Any] = {}
    task: str = ""
    text_format: dict[str, Any] | None = None
    training: dict[str, Any] = {}


def check_header(header: Mapping[str, Any], what: str) -> Header:
    """Check the fields of a header that are read elsewhere, its text format included; `what` names the file.

    Raises:
        CheckpointError: Something is wrong.
    """
    try:
        read_text_format(header)
        return Header.model_validate(dict(header))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = short_repr(".".join(map(str, fault["loc"])))
        raise CheckpointError(
            f"the header of {what} cannot be used: {where}: {fault['msg']}.",
            hint="docs/format.md lists the fields; get the file again.",
        ) from error


def check_storable(header: Mapping[str, Any]) -> None:
    """Check, before long work, that a header can be stored, with some room for the figures of the outcome.

    Raises:
        CheckpointError: It is too long, or could not be read again.
    """
    dump_header({**header, "room": "0" * _RESERVE})


def backbone_origin(header: Mapping[str, Any]) -> BackboneOrigin:
    """The model that a prefix was trained for, as far as its header says, which may be a caller's own."""
    origin = header.get("backbone")
    known = origin if isinstance(origin, Mapping) else {}
    return BackboneOrigin(**{key: str(known[key]) for key in ("name", "fingerprint", "kind") if known.get(key)})


def job_origin(header: Mapping[str, Any]) -> JobOrigin | None:
    """The job that made a prefix; None: its header names none."""
    return JobOrigin.model_validate(header["job"]) if header.get("job") else None


def parse_header(text: str) -> dict[str, Any]:
    """Read a JSON object that may come from anybody, such as a header.

    Raises:
        ValueError: It is too long, too deep (over 200 levels) or no object, or it holds what is not JSON: NaN,
            infinity, half a surrogate pair.
    """
    # Its size as a string in the JSON of the file. Half a surrogate pair, refused below, must not fail here.
    size = len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > HEADER_BYTES:
        raise ValueError(f"it takes {size:,} bytes, but may take {HEADER_BYTES:,}")
    value = from_json(text.encode(), allow_inf_nan=False)
    # Numbers such as 1e999 are read as infinity.
    json.dumps(value, allow_nan=False)
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    return value


def read_header(text: str, what: str) -> dict[str, Any]:
    """A header of this version; `what` names the file in messages.

    Raises:
        CheckpointError: It is no JSON object, or of another version.
    """
    try:
        header = parse_header(text)
    except ValueError as error:
        raise CheckpointError(f"the header of {what} cannot be read as a JSON object: {error}.", hint=_AGAIN) from error
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        fault = f"{what} is of format version {short_repr(version)}, but this prefixtune reads {FORMAT_VERSION}."
        raise CheckpointError(fault, hint="upgrade prefixtune, or get the file again.")
    return header


def dump_header(header: Mapping[str, Any]) -> str:
    """A header as JSON, with the version of the format.

    Raises:
        CheckpointError: It could not be read again.
    """
    try:
        text = json.dumps({**header, "format_version": FORMAT_VERSION}, ensure_ascii=False)
        parse_header(text)
    except (ValueError, TypeError) as error:
        hint = "shorten what it holds, and write plain numbers and texts."
        raise CheckpointError(f"the header cannot be stored: {error}.", hint=hint) from error
    return text
