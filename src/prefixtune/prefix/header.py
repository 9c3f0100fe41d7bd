"""The header of a prefix's file: its fields, and reading it without the tensors. See `docs/format.md`."""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.errors import CheckpointError, short_repr
from prefixtune.prefix.chat_format import is_allowed
from prefixtune.prefix.fingerprint import fingerprints_match
from prefixtune.prefix.geometry import Geometry
from prefixtune.prefix.text_format import read_text_format

FORMAT_VERSION = 2
"""Of files that are written and read."""

HEADER_KEY = "prefixtune"
"""The header's key in the file's metadata."""

_TENSOR = re.compile(r"(encoder|decoder|cross)\.\d{1,5}\.(key|value)|head\.(weight|bias)")
_ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_HEADER_BYTES = 2**20
"""Longest header that is read or written, in the bytes of the file; an ordinary one has a few thousand."""
_TENSORS_BYTES = 2**18
"""Longest table of tensors, in bytes; it has about a hundred per tensor."""
_RESERVE = 2**12
"""Bytes that a header may grow by while its prefix is trained."""
_DEPTH = 16
"""How deep objects and lists may be nested in a header."""


class _Part(BaseModel):
    """A part of a header: fields that are not listed are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow")


class _Backbone(_Part):
    name: str = ""
    fingerprint: str = ""
    kind: str = ""


class _Labels(_Part):
    kind: str
    by: str
    names: list[str] | tuple[str, ...]
    words: list[str] | tuple[str, ...] = ()


class _Job(_Part):
    id: str = Field(min_length=1)
    owner: str = Field(min_length=1)


class Header(_Part):
    """The fields of a header that are read elsewhere; `docs/format.md` has all."""

    adapter: str = ""
    backbone: _Backbone = _Backbone()
    composition: dict[str, Any] = {}
    description: str = ""
    form: str = ""
    initialization: dict[str, Any] = {}
    job: _Job | None = None
    labels: _Labels | None = None
    license: str = ""
    made_with: dict[str, Any] = {}
    method: str = ""
    peft: dict[str, Any] = {}
    placement: Literal["front"] = "front"
    rotation: dict[str, Any] = {}
    task: str = ""
    text_format: dict[str, Any] | None = None
    training: dict[str, Any] = {}


def parse_header(text: str) -> dict[str, Any]:
    """Read a header's JSON, which may come from anybody.

    Raises:
        ValueError: It is too long, too deep or no object, or it holds what is not JSON: NaN, infinity, half a surrogate
            pair.
    """
    # Its size as a string in the JSON of the file. Half a surrogate pair, refused below, must not fail here.
    size = len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    if size > _HEADER_BYTES:
        raise ValueError(f"it takes {size:,} bytes, but may take {_HEADER_BYTES:,}")
    try:
        value = json.loads(text)
        # `loads` reads numbers such as 1e999 as infinity, and takes half a surrogate pair.
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError(f"it nests more than {_DEPTH} levels") from None
    if not isinstance(value, dict):
        raise ValueError("it is no JSON object")
    if _is_deeper(value, _DEPTH):
        raise ValueError(f"it nests more than {_DEPTH} levels")
    return value


def _is_deeper(value: object, levels: int) -> bool:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(item, levels - 1) for item in inner)


def check_version(header: Mapping[str, Any], what: str) -> None:
    """Refuse a file of another format version; `what` names it in the message.

    Raises:
        CheckpointError: The version is another one.
    """
    version = header.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{what} cannot be read: its format version is {short_repr(version)}, but this prefixtune reads "
            f"{FORMAT_VERSION}.",
            hint="upgrade prefixtune, or get the file again.",
        )


def check_header(header: Mapping[str, Any], what: str) -> None:
    """Check the types of the fields that are read elsewhere, and the text format.

    Raises:
        CheckpointError: A type is wrong, or the text format cannot be used.
    """
    try:
        Header.model_validate(dict(header))
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        raise CheckpointError(
            f"the header of {what} cannot be used: {'.'.join(map(str, fault['loc']))}: {fault['msg']}.",
            hint="docs/format.md lists the fields; get the file again.",
        ) from error
    try:
        read_text_format(header)
    except CheckpointError as error:
        raise CheckpointError(f"{what} cannot be used: {error.message}", hint=error.hint) from error


def check_storable(header: Mapping[str, Any]) -> None:
    """Check, before long work, that a header can be stored, with some room for the figures of the outcome.

    Raises:
        CheckpointError: It is too long, or could not be read again.
    """
    dump_header({**header, "room": "0" * _RESERVE})


def dump_header(header: Mapping[str, Any]) -> str:
    """A header as JSON, with the version of the format.

    Raises:
        CheckpointError: It could not be read again.
    """
    text = json.dumps({**header, "format_version": FORMAT_VERSION}, ensure_ascii=False)
    try:
        parse_header(text)
    except ValueError as error:
        raise CheckpointError(
            f"the header cannot be stored: {error}.", hint="make labels, templates and descriptions shorter."
        ) from error
    return text


@dataclass(frozen=True)
class BackboneOrigin:
    """The model that a prefix was trained for, as far as its header says.

    Attributes:
        name: Empty: unknown.
        fingerprint: Empty: unknown.
        kind: Where the header names none, as of most other programs' prefixes, a decoder.
    """

    name: str = ""
    fingerprint: str = ""
    kind: str = "decoder"


def backbone_origin(header: Mapping[str, Any]) -> BackboneOrigin:
    """The model that a prefix was trained for."""
    origin = header.get("backbone")
    known = origin if isinstance(origin, Mapping) else {}
    return BackboneOrigin(**{key: str(known[key]) for key in ("name", "fingerprint", "kind") if known.get(key)})


@dataclass(frozen=True)
class JobOrigin:
    """The job that made a prefix for somebody who asked a server for it.

    Attributes:
        id: The job's.
        owner: Who asked: only they and admins see the prefix.
        step: Of a checkpoint, after how many steps; None: it is the job's result.
    """

    id: str
    owner: str
    step: int | None = None

    def to_header(self) -> dict[str, Any]:
        """The field `job` of a header."""
        return {"id": self.id, "owner": self.owner, **({} if self.step is None else {"step": self.step})}


def job_origin(header: Mapping[str, Any]) -> JobOrigin | None:
    """The job that made a prefix; None: its header names none."""
    job = header.get("job")
    if not job:
        return None
    step = job.get("step")
    return JobOrigin(job["id"], job["owner"], step if type(step) is int else None)


# --- without the tensors ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outline:
    """What is known of a file without reading its tensors.

    Attributes:
        header: The artifact's header.
        shapes: Name of a tensor -> its shape.
    """

    header: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def num_elements(self) -> int:
        """How many numbers all tensors hold."""
        return sum(map(math.prod, self.shapes.values()))


def read_outline(path: Path) -> Outline:
    """Read and check a file's header, without its tensors.

    The file is not mapped into memory: one that is truncated meanwhile would end the process.

    Raises:
        CheckpointError: It is not a complete prefix.
        OSError: It cannot be read.
    """
    with open(path, "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        start = handle.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= min(_HEADER_BYTES + _TENSORS_BYTES, size - 8):
            raise _broken(f"its header would take {length} bytes")
        text = handle.read(length)
    try:
        tensors = json.loads(text)
        header = parse_header(tensors.pop("__metadata__")[HEADER_KEY])
        shapes = {name: tuple(map(_whole, entry["shape"])) for name, entry in tensors.items()}
        expected = sum(math.prod(shapes[name]) * _ITEM_BYTES[entry["dtype"]] for name, entry in tensors.items())
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _broken("its header is not that of a prefix") from error
    check_version(header, "it")
    check_header(header, "it")
    if expected != size - 8 - length:
        raise _broken(f"its header announces {expected} bytes, but {size - 8 - length} follow")
    return Outline(header, shapes)


def incompatibilities(
    outline: Outline, geometry: Geometry, name: str, fingerprint: str | None = None, *, classifies: bool = False
) -> list[str]:
    """Why a prefix cannot be served in front of a model's text; empty: no reason is known.

    Args:
        outline: Of the prefix's file.
        geometry: The model's.
        name: The model's, for messages.
        fingerprint: The model's; None: weights are not compared.
        classifies: Prefixes that classify or tag are served too.
    """
    header, shapes, reasons = outline.header, dict(outline.shapes), list[str]()
    if classifies:
        reasons += _faults_of_labels(header.get("labels"), shapes.pop("head.weight", ()), shapes.pop("head.bias", ()))
    elif "head.weight" in shapes or header.get("labels"):
        reasons.append("it classifies, and writes no text")
    stored = read_text_format(header)
    if stored is not None and not is_allowed(stored.chat_template):
        reasons.append("it has a chat template of its own, which was not named (--chat-templates)")
    if header.get("adapter"):
        reasons.append("it was trained together with a LoRA adapter")
    if any(not _TENSOR.fullmatch(tensor) for tensor in shapes):
        reasons.append("it holds tensors that do not belong to a prefix")
    elif not reasons and not _fits(shapes, geometry):
        reasons.append(f"its shapes are not those of {name!r}")
    elif not reasons and fingerprint is not None:
        stored = backbone_origin(header).fingerprint
        if stored and not fingerprints_match(stored, fingerprint):
            reasons.append(f"it was trained for other weights than those of {name!r}")
    return reasons


def _faults_of_labels(labels: Any, weight: tuple[int, ...], bias: tuple[int, ...]) -> list[str]:
    """What is wrong with the labels in a header and with the shapes of the head; nothing of both is right."""
    if not labels and not weight and not bias:
        return []
    if not labels:
        return ["it has a head, but no labels"]
    kind, by, names, words = labels["kind"], labels["by"], labels["names"], labels.get("words") or []
    if (kind, by) not in (("classification", "head"), ("classification", "words"), ("tagging", "head")):
        return ["its kind of labels is unknown"]
    count = len(names)
    if count < 2 or (by == "words" and (len(words) != count or weight or bias)):
        return ["its labels and their words do not match"]
    if by == "head" and (len(weight) != 2 or weight[0] != count or bias != (count,)):
        return ["its head has not one row for each label"]
    return []


def _fits(shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> bool:
    expected = {}
    named = {name.partition(".")[0] for name in shapes}
    for site, layers in geometry.items():
        for index, shape in enumerate(layers if site in named else ()):
            for part, size in (("key", shape.key_dim), ("value", shape.value_dim)):
                expected[f"{site}.{index}.{part}"] = (shape.num_kv_heads, size)
    return (
        bool(shapes)
        and shapes.keys() == expected.keys()
        and all(len(shape) == 3 and (shape[0], shape[2]) == expected[name] for name, shape in shapes.items())
    )


def _broken(what: str) -> CheckpointError:
    return CheckpointError(f"it is not a complete prefix: {what}.", hint="get the file again.")


def _whole(size: object) -> int:
    if not isinstance(size, int) or size < 0:
        raise ValueError(size)
    return size
