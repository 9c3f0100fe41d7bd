"""A folder of prefixes: files NAME.safetensors, how to see that one has changed, and how vLLM is told which it is."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from prefixtune.errors import CheckpointError, RequestError, first_line
from prefixtune.prefix.prefix import read_outline

ENDING = ".safetensors"
_NAME = re.compile(r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")
_PARAMETER = "prefixtune"
"""The key in `kv_transfer_params`."""
_SALT = "prefixtune:"

Signature = tuple[int, int, int]
"""Modification time in nanoseconds, size in bytes, and inode: where it differs, the file has changed."""


def path_of(folder: Path, name: str) -> Path:
    """The path of the prefix of that name."""
    return folder / f"{name}{ENDING}"


def list_names(folder: Path) -> set[str]:
    """Names of all files that may be prefixes.

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(folder) as entries:
        files = [entry.name for entry in entries if entry.name.endswith(ENDING) and not entry.name.startswith(".")]
    return {name.removesuffix(ENDING) for name in files}


def signature_of(file: Path | int) -> Signature | None:
    """The signature of a file, or of what a descriptor has open, whatever its path leads to by now; None: no file."""
    try:
        status = os.stat(file)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


def check_name(name: object) -> None:
    """Refuse names that could lead out of the folder.

    Raises:
        RequestError: It is not a valid name.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        hint = "use 1 to 128 letters, digits, '.', '_' and '-', not starting with a dot."
        raise RequestError(f"{str(name)[:128]!r} is not a valid name of a prefix.", hint=hint)


def check_regular_file(folder: Path, name: str) -> None:
    """Refuse what is not a regular file of the folder.

    Raises:
        CheckpointError: It is not.
        OSError: Its status cannot be read, as that of a link to itself.
    """
    path = path_of(folder, name)
    if not stat.S_ISREG(os.stat(path).st_mode) or path.resolve().parent != folder.resolve():
        raise CheckpointError("it is no regular file in the folder.", hint="copy the file into the folder.")


@dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class PrefixReference:
    """A prefix in the folder that vLLM's connector reads: its file, and what is in it.

    Attributes:
        name: Of its file, without the ending.
        sha256: Of the file's bytes: whoever replaces the file makes another prefix.
        length: P.
        fault: Why the request must fail; empty: it is right.
    """

    name: Annotated[str, Field(pattern=_NAME.pattern)]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    length: Annotated[int, Field(ge=1)]
    fault: str = ""

    @classmethod
    def of_file(cls, path: Path) -> PrefixReference:
        """The reference to a file NAME.safetensors.

        Raises:
            CheckpointError: It is no complete prefix, or none of a decoder.
            RequestError: Its name is not one that requests can have.
            OSError: It cannot be read.
        """
        check_name(path.stem)
        if not (length := read_outline(path).length()):
            raise CheckpointError(f"{str(path)!r} has no prefix of a decoder.", hint="vLLM takes decoder-only models.")
        return cls(path.stem, hash_file(path), length)

    @property
    def request_fields(self) -> dict[str, Any]:
        """Fields of a request for /v1/completions, whose prompt begins with P token ids, whichever they are.

        The salt keeps vLLM's cached blocks of different prefixes apart.
        """
        fields = {"name": self.name, "sha256": self.sha256, "length": self.length}
        return {"kv_transfer_params": {_PARAMETER: fields}, "cache_salt": f"{_SALT}{self.sha256}"}

    @classmethod
    def of_request(cls, params: object, cache_salt: str | None) -> PrefixReference | None:
        """The inverse of `request_fields`; None where the request names no prefix.

        Never raises: it runs in vLLM's scheduler. A request with a wrong salt must fail, or others would find its
        blocks.
        """
        is_named = isinstance(params, Mapping) and _PARAMETER in params
        if not is_named and not str(cache_salt).startswith(_SALT):
            return None
        try:
            reference = cls(**(params[_PARAMETER] if isinstance(params, Mapping) and is_named else {}))
        except (TypeError, ValueError) as error:
            return cls("none", "0" * 64, 1, f"its reference to a prefix is wrong: {first_line(error)}")
        if cache_salt != reference.request_fields["cache_salt"]:
            return replace(reference, length=1, fault="its cache_salt is not that of its prefix")
        return reference


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 digits.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
