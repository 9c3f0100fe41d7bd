"""The prefixes in a folder, as they are now: which of them this model can serve, and why not the others."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.interop.vllm.joining import check_headers
from prefixtune.interop.vllm.reference import PrefixPart, PrefixReference
from prefixtune.interop.vllm.settings import Settings
from prefixtune.prefix.card import is_repository
from prefixtune.prefix.folder import Signature, check_name, check_regular_file, list_names, path_of, signature_of
from prefixtune.prefix.geometry import Geometry
from prefixtune.prefix.header import backbone_origin
from prefixtune.prefix.prefix import read_outline
from prefixtune.prefix.serving import incompatibilities
from prefixtune.prefix.text_format import TextFormat, read_text_format

__all__ = ["PrefixFolder", "ServedPrefix"]


@dataclass(frozen=True)
class ServedPrefix:
    """A prefix that can be served.

    Attributes:
        reference: How a request names it.
        description: For people.
        created: When its file was last changed, in seconds since 1970.
        num_bytes: Most that it takes in a worker.
        text_format: The one that it was trained with; None: its file stores none.
        header: Its file's, or that of the joined prefix.
    """

    reference: PrefixReference
    description: str
    created: int
    num_bytes: int
    text_format: TextFormat | None = None
    header: Mapping[str, Any] = field(default_factory=dict)


class PrefixFolder:
    """The prefixes in a folder, by name. Thread-safe.

    Only headers are read, and checked against the model; a file that has changed is read again.

    Args:
        settings: The folder, and what is accepted.
        geometry: The model's.
        model_name: For messages.
        hub_id: The model's on the hub; empty: it is a folder, whose name says nothing.
    """

    def __init__(self, settings: Settings, geometry: Geometry, model_name: str, *, hub_id: str = "") -> None:
        self.settings, self.geometry, self.model_name, self.hub_id = settings, geometry, model_name, hub_id
        # A file's signature, and its prefix or why it is not served.
        self._read_files: dict[str, tuple[Signature, ServedPrefix | str]] = {}
        self._lock = threading.Lock()

    def find(self, name: object) -> ServedPrefix | None:
        """The prefix of that name; None: there is none.

        Raises:
            CheckpointError: Its file is not served; the message says why.
        """
        try:
            check_name(name)
        except RequestError:
            return None
        return self._load(str(name))

    def all(self) -> dict[str, ServedPrefix]:
        """Every prefix that can be served, by name; reads all headers that are new."""
        try:
            names = sorted(list_names(self.settings.prefixes))
        except OSError:
            return {}
        prefixes = {}
        for name in names:
            try:
                prefix = self.find(name)
            except CheckpointError:
                continue
            if prefix is not None:
                prefixes[name] = prefix
        with self._lock:
            for name in self._read_files.keys() - set(names):
                del self._read_files[name]
        return prefixes

    def join(self, prefixes: Sequence[ServedPrefix]) -> ServedPrefix:
        """Several prefixes as one: one after the other, in this order.

        Raises:
            RequestError: They cannot be joined; the message says why.
        """
        reference = PrefixReference(tuple(part for prefix in prefixes for part in prefix.reference.parts))
        num_bytes = sum(prefix.num_bytes for prefix in prefixes)
        if num_bytes > self.settings.cache_bytes:
            raise RequestError(
                f"{reference.name!r} takes {num_bytes:,} bytes, but all together may take "
                f"{self.settings.cache_bytes:,}.",
                hint="join fewer, or raise cache_mib.",
            )
        headers = {prefix.reference.name: prefix.header for prefix in prefixes}
        lengths = [prefix.reference.length for prefix in prefixes]
        header = check_headers(headers, lengths, self.geometry["decoder"])
        created = max(prefix.created for prefix in prefixes)
        return ServedPrefix(reference, "", created, num_bytes, read_text_format(header), header)

    def _load(self, name: str) -> ServedPrefix | None:
        path = path_of(self.settings.prefixes, name)
        signature = signature_of(path)
        if signature is None:
            with self._lock:
                self._read_files.pop(name, None)
            return None
        with self._lock:
            entry = self._read_files.get(name)
        if entry is None or entry[0] != signature:
            try:
                entry = signature, self._read(name, path, signature)
            except OSError as error:
                # It may pass, so it is not remembered.
                raise CheckpointError(f"the prefix {name!r} cannot be read now.", hint="try again.") from error
            with self._lock:
                self._read_files[name] = entry
        if isinstance(entry[1], str):
            raise CheckpointError(f"the prefix {name!r} is not served: {entry[1]}", hint="replace its file.")
        return entry[1]

    def _read(self, name: str, path: Path, signature: Signature) -> ServedPrefix | str:
        """The prefix in a file, or why it is not served."""
        try:
            check_regular_file(self.settings.prefixes, name)
            outline = read_outline(path)
        except PrefixError as error:
            return error.message
        reasons = incompatibilities(outline, self.geometry, self.model_name)
        name_of_model = backbone_origin(outline.header).name
        is_other = is_repository(name_of_model) and name_of_model.lower() != self.hub_id.lower()
        if self.hub_id and is_other and not self.settings.allow_other_backbone:
            reasons.append(
                f"it was trained for {name_of_model!r}, not for {self.hub_id!r} (allow_other_backbone accepts it, see "
                "docs/serving.md)"
            )
        num_bytes = outline.num_parameters * 4
        if num_bytes > self.settings.cache_bytes:
            reasons.append(f"it takes {num_bytes:,} bytes, but all together may take {self.settings.cache_bytes:,}")
        if reasons:
            return f"{'; '.join(reasons)}."
        description = str(outline.header.get("description") or outline.header.get("task") or "")
        reference = PrefixReference((PrefixPart(name, signature[:2], outline.length()),))
        text_format = read_text_format(outline.header)
        return ServedPrefix(reference, description, signature[0] // 10**9, num_bytes, text_format, outline.header)
