"""The models there are: each prefix by its name, and the bare backbone by its own.

Says what a caller may see of them. Knows nothing of requests' contents.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS
from prefixtune.data.encoding import default_format
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.server.auth import Caller
from prefixtune.server.models.store import PrefixStore
from prefixtune.server.models.task_schema import TaskSchema, decoding_of, task_schema_of
from prefixtune.server.responses import ApiError, forbidden, not_found, unavailable

__all__ = ["Catalog", "Served"]


@dataclass(frozen=True, eq=False)
class Served:
    """A model that a request asks for.

    Attributes:
        name: Its name.
        prefix: None for the bare backbone.
        header: The prefix's.
    """

    name: str
    prefix: Prefix | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def form(self) -> TaskSchema | None:
        """What its task takes."""
        return task_schema_of(self.header)

    @property
    def prefix_length(self) -> int:
        """Positions that the prefix takes."""
        return 0 if self.prefix is None else self.prefix.length()


class Catalog:
    """Names -> models.

    Args:
        store: The prefixes.
        backbone: The model.
        backbone_id: The bare backbone's name.
        created: When the server began, in seconds since 1970.
    """

    def __init__(self, store: PrefixStore, backbone: Backbone, backbone_id: str, created: int) -> None:
        self.store, self.backbone, self.backbone_id, self.created = store, backbone, backbone_id, created

    def names(self, caller: Caller) -> list[str]:
        """What a caller may use: the bare backbone first."""
        prefixes = [name for name in self.store.names() if name != self.backbone_id]
        return [name for name in (self.backbone_id, *prefixes) if caller.may_use(name)]

    def check(self, name: str, caller: Caller) -> None:
        """Refuse a model that the caller may not use, whether there is one or not.

        Raises:
            ApiError: 403 or 404.
        """
        if not caller.may_use(name):
            raise forbidden(f"the key {caller.name!r} may not use the model {name[:128]!r}.", "model_not_allowed")
        if name != self.backbone_id and name not in self.store and name not in self.store.refused:
            # Names of others' prefixes are no hint.
            raise not_found("model", name, self.names(caller))

    async def open(self, name: str, caller: Caller) -> Served:
        """The model of that name, with its prefix loaded.

        Raises:
            ApiError: The caller may not use it, there is none, or its file is broken.
        """
        self.check(name, caller)
        if name == self.backbone_id:
            return Served(name)
        try:
            prefix = await asyncio.to_thread(self.store.get, name)
        except PrefixError as error:
            raise _not_served(error, name) from None
        return Served(name, prefix, prefix.header)

    def header(self, name: str) -> Mapping[str, Any]:
        """What a model's artifact says of itself; nothing of the bare backbone.

        Raises:
            ApiError: There is no such prefix now, or its file is broken.
        """
        try:
            return {} if name == self.backbone_id else self.store.header(name)
        except PrefixError as error:
            raise _not_served(error, name) from None

    def describe_all(self, caller: Caller) -> list[dict[str, Any]]:
        """All models that a caller may use; reads every header, so not in the event loop."""
        described = []
        for name in self.names(caller):
            # It may have gone since.
            with contextlib.suppress(ApiError):
                described.append(self.describe(name))
        return described

    def describe(self, name: str) -> dict[str, Any]:
        """A model as `/v1/models` tells it.

        Raises:
            ApiError: There is no such prefix now, or its file is broken.
        """
        told = {"id": name, "object": "model", "created": self.created, "owned_by": "prefixtune"}
        told["kind"] = "backbone" if name == self.backbone_id else "prefix"
        header = self.header(name)
        if name == self.backbone_id:
            return {**told, "description": "the bare backbone", "task": None}
        task = header.get("task") if isinstance(header.get("task"), str) else None
        known = TASKS[task].description if task in TASKS else "a prefix"
        kinds = {"prefix_length": dict, "license": str}
        facts = {key: header[key] for key, kind in kinds.items() if header.get(key) and isinstance(header[key], kind)}
        described = header.get("description")
        return {**told, "description": described if isinstance(described, str) else known, "task": task, **facts}

    def describe_task(self, name: str) -> dict[str, Any]:
        """What a task takes, for a page that asks for it.

        Raises:
            ApiError: There is no such prefix now, or its file is broken.
        """
        header = self.header(name)
        form, decoding = task_schema_of(header), decoding_of(header)
        return {
            "id": name,
            "task": header["task"] if isinstance(header.get("task"), str) else None,
            "fields": form.describe() if form else [],
            "max_tokens": decoding.get("max_new_tokens"),
        }

    def text_format(self, header: Mapping[str, Any]) -> TextFormat:
        """The text around a source: what a prefix was trained with, or what suits the backbone.

        Raises:
            ApiError: The header's is none.
        """
        return self.trained_format(header) or default_format(self.backbone)

    def trained_format(self, header: Mapping[str, Any]) -> TextFormat | None:
        """The text format that a prefix was trained with; None: its file stores none, or it is the bare backbone.

        Raises:
            ApiError: The header's cannot be used.
        """
        try:
            return read_text_format(header)
        except CheckpointError:
            raise unavailable("the text format in this model's file cannot be used.", "model_not_served") from None


def _not_served(error: PrefixError, name: str) -> ApiError:
    if isinstance(error, RequestError):
        return not_found("model", name)
    # Why, only admins are told: what is wrong with a file may name places and models of whoever made it.
    return unavailable(f"the file of {name!r} is not served; /admin/prefixes tells why.", "model_not_served")
