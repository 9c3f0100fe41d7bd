"""All models by name: the prefixes and the bare backbone, as far as a caller may use and see them."""

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
from prefixtune.server.models.task_schema import task_decoding, task_schema_of
from prefixtune.server.responses import ApiError, forbidden, not_found, unavailable

__all__ = ["Catalog", "ServedModel"]


_TEXTS = ("task", "description")
"""Texts of a header; it comes from outside, and anything may be in their place."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that a request names.

    Attributes:
        name: Its name.
        prefix: None for the bare backbone.
        header: Of the prefix's file.
    """

    name: str
    prefix: Prefix | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()


class Catalog:
    """The models by name.

    Args:
        store: The prefixes.
        backbone: The model.
        backbone_id: The bare backbone's name.
        created: When the server started, in seconds since 1970.
    """

    def __init__(self, store: PrefixStore, backbone: Backbone, backbone_id: str, created: int) -> None:
        self.store, self.backbone, self.backbone_id, self.created = store, backbone, backbone_id, created

    def names(self, caller: Caller) -> list[str]:
        """The models that a caller may use: the bare backbone first."""
        prefixes = [name for name in self.store.names() if name != self.backbone_id]
        return [name for name in (self.backbone_id, *prefixes) if caller.may_use(name)]

    def check_access(self, name: str, caller: Caller) -> None:
        """Refuse a name that the caller may not use, whether there is such a model or not.

        Raises:
            ApiError: 403 or 404.
        """
        if not caller.may_use(name):
            raise forbidden(f"the key {caller.name!r} may not use the model {name[:128]!r}.", "model_not_allowed")
        if name != self.backbone_id and name not in self.store and name not in self.store.refused:
            # Suggests only names that the caller may see.
            raise not_found("model", name, self.names(caller))

    async def load(self, name: str, caller: Caller) -> ServedModel:
        """The model of that name, with its prefix loaded.

        Raises:
            ApiError: The caller may not use it, there is none, or its file is broken.
        """
        self.check_access(name, caller)
        if name == self.backbone_id:
            return ServedModel(name)
        try:
            prefix = await asyncio.to_thread(self.store.get, name)
        except PrefixError as error:
            raise _not_served(error, name) from None
        return ServedModel(name, prefix, prefix.header)

    def header(self, name: str) -> Mapping[str, Any]:
        """The header of a model's file; empty for the bare backbone.

        Raises:
            ApiError: The prefix does not exist any more, or its file is broken.
        """
        try:
            return {} if name == self.backbone_id else self.store.header(name)
        except PrefixError as error:
            raise _not_served(error, name) from None

    def describe_all(self, caller: Caller) -> list[dict[str, Any]]:
        """All models that a caller may use; reads every header, so not for the event loop."""
        models = []
        for name in self.names(caller):
            # It may have been deleted meanwhile.
            with contextlib.suppress(ApiError):
                models.append(self.describe(name))
        return models

    def describe(self, name: str) -> dict[str, Any]:
        """A model as `/v1/models` lists it.

        Raises:
            ApiError: The prefix does not exist any more, or its file is broken.
        """
        model = {"id": name, "object": "model", "created": self.created, "owned_by": "prefixtune"}
        if name == self.backbone_id:
            return {**model, "kind": "backbone", "description": "the bare backbone", "task": None}
        header = self.header(name)
        task, description = (header.get(key) if isinstance(header.get(key), str) else None for key in _TEXTS)
        if description is None:
            description = TASKS[task].description if task in TASKS else "a prefix"
        types = {"prefix_length": dict, "license": str}
        more = {key: header[key] for key, kind in types.items() if header.get(key) and isinstance(header[key], kind)}
        return {**model, "kind": "prefix", "description": description, "task": task, **more}

    def describe_task(self, name: str) -> dict[str, Any]:
        """The fields of a prefix's task, for a page that shows a form.

        Raises:
            ApiError: The prefix does not exist any more, or its file is broken.
        """
        header = self.header(name)
        schema, decoding = task_schema_of(header), task_decoding(header)
        return {
            "id": name,
            "task": header["task"] if isinstance(header.get("task"), str) else None,
            "fields": schema.describe() if schema else [],
            "max_tokens": decoding.get("max_new_tokens"),
        }

    def text_format(self, header: Mapping[str, Any]) -> TextFormat:
        """The text format that a prefix was trained with, or else the backbone's default.

        Raises:
            ApiError: The header's cannot be used.
        """
        return self.trained_format(header) or default_format(self.backbone)

    def trained_format(self, header: Mapping[str, Any]) -> TextFormat | None:
        """The text format that a prefix was trained with; None: its file has none, or it is the bare backbone.

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
    # The reason is for admins only: it may name paths and models of whoever made the file.
    return unavailable(f"the file of {name!r} is not served; /admin/prefixes says why.", "model_not_served")
