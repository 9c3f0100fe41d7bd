"""How a request to vLLM names its prefix: by its file, and by what is in it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from prefixtune.prefix.folder import path_of
from prefixtune.prefix.prefix import read_outline

__all__ = ["PrefixReference"]


_PARAMETER = "prefixtune"
"""The key in `kv_transfer_params`."""
_SALT = "prefixtune:"


class _Fields(BaseModel):
    """A reference as JSON."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(pattern=r"^[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    length: int = Field(ge=1)


@dataclass(frozen=True)
class PrefixReference:
    """A prefix in the folder that vLLM's connector reads.

    Attributes:
        name: Of its file, without the ending.
        sha256: Of the file's bytes: whoever replaces the file makes another prefix.
        length: P.
        fault: Why the request must fail; empty: it is right.
    """

    name: str
    sha256: str
    length: int
    fault: str = ""

    @classmethod
    def of_file(cls, path: Path) -> PrefixReference:
        """The reference to a file NAME.safetensors.

        Raises:
            CheckpointError: It is no complete prefix.
            OSError: It cannot be read.
        """
        return cls(path.stem, hash_file(path), read_outline(path).length())

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
            fields = _Fields.model_validate(params[_PARAMETER] if isinstance(params, Mapping) and is_named else {})
        except ValidationError as error:
            return cls("", "", 1, f"its reference to a prefix is wrong: {error.errors()[0]['msg']}")
        reference = cls(fields.name, fields.sha256, fields.length)
        if cache_salt != reference.request_fields["cache_salt"]:
            return cls(fields.name, fields.sha256, 1, "its cache_salt is not that of its prefix")
        return reference

    def path(self, folder: Path) -> Path:
        """Its file in a folder."""
        return path_of(folder, self.name)


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, as 64 digits.

    Raises:
        OSError: It cannot be read.
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
