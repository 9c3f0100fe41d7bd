"""All models by name: the prefixes, those that are joined, and the bare backbone, as far as a caller may use them."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS
from prefixtune.data.encoding import default_format
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.compose import concatenate
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.server.auth import Caller
from prefixtune.server.logs import log
from prefixtune.server.models.store import PrefixStore
from prefixtune.server.models.task_schema import task_decoding, task_schema_of
from prefixtune.server.responses import ApiError, bad_request, forbidden, not_found, unavailable

__all__ = ["SEPARATOR", "Catalog", "ServedModel"]


SEPARATOR = "+"
"""Between the names of joined prefixes; no file's name may have it."""
_TEXTS = ("task", "description")
"""Texts of a header; it comes from outside, and anything may be in their place."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that a request names.

    Attributes:
        name: Its name; of joined prefixes all names, with a + between them.
        prefix: None for the bare backbone.
        header: Of the prefix's file, or of the joined prefix.
        parts: The names of the prefixes that are joined; empty: it is one, or none.
    """

    name: str
    prefix: Prefix | None = None
    header: Mapping[str, Any] = field(default_factory=dict)
    parts: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The names that it is counted under."""
        return self.parts or (self.name,)

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()


class Catalog:
    """The models by name. Methods may wait for the disk, so they are not for the event loop.

    What a job made is its owner's and an admin's, or everybody's where no key is configured; all else goes by the
    patterns of keys.

    Args:
        store: The prefixes.
        backbone: The model.
        backbone_id: The bare backbone's name, which hides a prefix of that name.
        created: When the server started, in seconds since 1970.
        max_joined: Most prefixes that are joined.
        max_length: Most positions of a text, prefix included.
        is_open: Whether no key is configured.
    """

    def __init__(
        self,
        store: PrefixStore,
        backbone: Backbone,
        backbone_id: str,
        created: int,
        *,
        max_joined: int,
        max_length: int,
        is_open: bool = False,
    ) -> None:
        self.store, self.backbone, self.backbone_id, self.created = store, backbone, backbone_id, created
        self.max_joined, self.max_length, self.is_open = max_joined, max_length, is_open
        # One thread joins at a time: requests for the same prefixes at once wait for one result.
        self._joining = threading.Lock()

    # --- who may do what ----------------------------------------------------------------------------------------------

    def owns(self, name: str, caller: Caller) -> bool:
        """Whether a job of the caller made a prefix; for admins, and where there are no keys, a job of anybody."""
        origin = self.store.origin(name)
        return origin is not None and self._is_theirs(origin, caller)

    def may_copy(self, header: Mapping[str, Any], caller: Caller) -> bool:
        """Whether the caller may have a prefix, or what is trained from it, by the header of its file.

        Owners and admins may; where there are no keys, everybody.
        """
        origin = job_origin(header)
        return self.is_open or caller.rules.admin or (origin is not None and origin.owner == caller.name)

    def may_use(self, model: str, caller: Caller) -> bool:
        """Whether there is such a model, and the caller may use it: of joined prefixes, every one."""
        names = [model] if model == self.backbone_id else model.split(SEPARATOR)
        return all(self._is_known(name) and self._allows(name, self._origin(name), caller) for name in names)

    def check_access(self, names: Sequence[str], caller: Caller) -> None:
        """Refuse names of which the caller may not use one, whether there is such a model or not.

        What a job made for somebody else is answered like a name that there is not.

        Raises:
            ApiError: 403 or 404.
        """
        for name in names:
            if not (caller.may_use(name) or self.owns(name, caller)):
                raise forbidden(f"the key {caller.name!r} may not use the model {name[:128]!r}.", "model_not_allowed")
        for name in names:
            if not (self._is_known(name) and self._allows(name, self._origin(name), caller)):
                raise not_found("model", name)

    def _is_known(self, name: str) -> bool:
        return name == self.backbone_id or name in self.store

    def _origin(self, name: str) -> JobOrigin | None:
        return None if name == self.backbone_id else self.store.origin(name)

    def _allows(self, name: str, origin: JobOrigin | None, caller: Caller) -> bool:
        return caller.may_use(name) if origin is None else self._is_theirs(origin, caller)

    def _is_theirs(self, origin: JobOrigin, caller: Caller) -> bool:
        return self.is_open or caller.rules.admin or origin.owner == caller.name

    def _check_header(self, name: str, header: Mapping[str, Any], caller: Caller) -> None:
        """Refuse a file that the caller may not use, and that has replaced the one that `check_access` knew."""
        if not self._allows(name, job_origin(header), caller):
            raise not_found("model", name)

    # --- getting one --------------------------------------------------------------------------------------------------

    def parts(self, model: str, prefixes: Sequence[str] | None = None) -> tuple[str, ...]:
        """The names within a model's name, or those of prefixes to join: one or several.

        Raises:
            ApiError: They cannot be joined, whatever they are.
        """
        if prefixes is None:
            # The name of a backbone may have a +, that of a prefix cannot.
            names, param = (model,) if model == self.backbone_id else tuple(model.split(SEPARATOR)), "model"
        elif model in ("", self.backbone_id, SEPARATOR.join(prefixes)):
            names, param = tuple(prefixes), "prefixes"
        else:
            message = f"the model is {model[:128]!r}, but 'prefixes' names others."
            raise bad_request(message, "model", hint=f"leave it out, or write {self.backbone_id!r}.")
        if len(names) == 1:
            return names
        if len(names) > self.max_joined:
            message = f"{len(names)} prefixes are named, but this server joins at most {self.max_joined}."
            raise bad_request(message, param, "too_many_prefixes")
        if "" in names or self.backbone_id in names or len(set(names)) < len(names):
            raise bad_request("joined names must be those of prefixes, each once, as in manual+user-42.", param)
        return names

    def load(self, model: str, caller: Caller, prefixes: Sequence[str] | None = None) -> ServedModel:
        """The model of that name, with its prefix loaded.

        Args:
            model: Its name, or those of several prefixes to join, as in `manual+user-42`.
            caller: Who must be allowed to use all of them.
            prefixes: The names of the prefixes instead; `model` is then empty, theirs, or the bare backbone's.

        Raises:
            ApiError: The caller may not use it, there is none, its file is broken, or prefixes cannot be joined.
        """
        names = self.parts(model, prefixes)
        self.check_access(names, caller)
        if names == (self.backbone_id,):
            return ServedModel(self.backbone_id)
        versions = tuple(map(self.store.version, names))
        loaded = [self._load_one(name, caller) for name in names]
        if len(names) == 1:
            return ServedModel(names[0], loaded[0], loaded[0].header)
        try:
            prefix = self._join(names, versions, loaded)
        except RequestError as error:
            raise bad_request(
                error.message, "model" if prefixes is None else "prefixes", "context_length_exceeded"
            ) from None
        except PrefixError as error:
            raise bad_request(error.message, "model" if prefixes is None else "prefixes", hint=error.hint) from None
        return ServedModel(SEPARATOR.join(names), prefix, prefix.header, names)

    def _load_one(self, name: str, caller: Caller) -> Prefix:
        try:
            prefix = self.store.get(name)
        except PrefixError as error:
            raise _not_served(error, name) from None
        self._check_header(name, prefix.header, caller)
        return prefix

    def _join(self, names: tuple[str, ...], versions: tuple[Any, ...], parts: Sequence[Prefix]) -> Prefix:
        """Prefixes joined in their order, as `prefixtune compose` joins files.

        Raises:
            RequestError: Together they are too long or too large.
            PrefixError: They cannot be joined.
        """
        length, size = sum(part.length() for part in parts), sum(part.num_bytes for part in parts)
        # A decoder's text follows its prefix; those of an encoder-decoder take none of its positions.
        if self.backbone.kind != "encoder-decoder" and length >= self.max_length:
            message = f"the joined prefixes take {length} positions, but the limit is {self.max_length}, text included."
            raise RequestError(message, hint="join fewer of them.")
        if 2 * size > self.store.cache.max_bytes:
            message = f"the joined prefixes take {size:,} bytes, but {self.store.cache.max_bytes // 2:,} are the most."
            raise RequestError(message, hint="join fewer of them.")
        with self._joining:
            joined = self.store.cache.get(names, versions)
            if joined is None:
                # The header numbers the parts: it names no prefix.
                joined = concatenate(parts, self.backbone.rotation)
                self.store.cache.put(names, versions, joined)
            return joined

    def load_header(self, model: str, caller: Caller) -> Mapping[str, Any]:
        """The header of a model's file, or of joined prefixes; empty for the bare backbone.

        Raises:
            ApiError: As `load`.
        """
        names = self.parts(model)
        if len(names) > 1:
            return self.load(model, caller).header
        self.check_access(names, caller)
        if model == self.backbone_id:
            return {}
        try:
            header = self.store.header(model)
        except PrefixError as error:
            raise _not_served(error, model) from None
        self._check_header(model, header, caller)
        return header

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

    # --- describing them ----------------------------------------------------------------------------------------------

    def describe_all(self, caller: Caller) -> list[dict[str, Any]]:
        """The models that a caller may use, the bare backbone first; checkpoints of jobs are left out."""
        models = []
        for name in (self.backbone_id, *(name for name in self.store.names() if name != self.backbone_id)):
            origin = self._origin(name)
            if self._allows(name, origin, caller) and (origin is None or origin.step is None):
                # It may have been deleted meanwhile.
                with contextlib.suppress(ApiError):
                    models.append(self.describe(name, caller))
        return models

    def describe(self, model: str, caller: Caller) -> dict[str, Any]:
        """A model as `/v1/models` lists it; joined prefixes, which are not listed, too.

        Raises:
            ApiError: As `load`.
        """
        if len(self.parts(model)) > 1:
            joined = self.load(model, caller)
            task = joined.header.get("task")
            return {
                **self._model(joined.name, joined.prefix_length),
                "kind": "joined",
                "description": f"{len(joined.parts)} prefixes, joined in this order",
                "task": task if isinstance(task, str) else None,
                "prefix_length": joined.prefix.lengths if joined.prefix else {},
            }
        header = self.load_header(model, caller)
        if model == self.backbone_id:
            return {**self._model(model), "kind": "backbone", "description": "the bare backbone", "task": None}
        task, description = (header.get(key) if isinstance(header.get(key), str) else None for key in _TEXTS)
        if description is None:
            description = TASKS[task].description if task in TASKS else "a prefix"
        types = {"prefix_length": dict, "license": str}
        more = {key: header[key] for key, kind in types.items() if header.get(key) and isinstance(header[key], kind)}
        length = more.get("prefix_length", {}).get("decoder")
        described = self._model(model, length if type(length) is int else 0)
        origin = job_origin(header)
        if origin is not None:
            described |= {"created": self.store.modified(model), "owned_by": origin.owner, "job": origin.id}
        return {**described, "kind": "prefix", "description": description, "task": task, **more}

    def _model(self, name: str, prefix_length: int = 0) -> dict[str, Any]:
        """What OpenAI's and vLLM's clients read of a model."""
        takes_room = self.backbone.kind == "decoder"
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "prefixtune",
            "root": name,
            "parent": None if name == self.backbone_id else self.backbone_id,
            "max_model_len": max(0, self.max_length - prefix_length) if takes_room else self.max_length,
        }

    def describe_task(self, name: str, header: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a prefix's task, for a page that shows a form.

        Args:
            name: The model's.
            header: Of the prefix.
        """
        schema, decoding = task_schema_of(header), task_decoding(header)
        return {
            "id": name,
            "task": header["task"] if isinstance(header.get("task"), str) else None,
            "fields": schema.describe() if schema else [],
            "max_tokens": decoding.get("max_new_tokens"),
        }

    # --- changing them ------------------------------------------------------------------------------------------------

    def delete(self, model: str, caller: Caller) -> tuple[str, ...]:
        """Remove what a job made, a result together with its checkpoints; admins remove any prefix.

        Returns:
            The names that are gone.

        Raises:
            ApiError: There is no such model, or it is not the caller's.
            PrefixError: A file cannot be removed.
        """
        if model != self.backbone_id and SEPARATOR in model:
            raise not_found("model", model)
        self.check_access((model,), caller)
        if model == self.backbone_id:
            raise forbidden(f"{model[:128]!r} is the bare backbone, which is not deleted.", "model_not_deletable")
        if not (caller.rules.admin or self.owns(model, caller)):
            raise forbidden(f"{model[:128]!r} was made by no job of this key.", "not_the_owner")
        # The name itself comes last: if something fails, it can be deleted again.
        result = self.store.origin(model)
        own = None if result is None or result.step is not None else result.id
        checkpoints = [name for name, origin in self._beside(model).items() if origin.id == own]
        return self._remove([*checkpoints, model])

    def put(self, name: str, source: Path) -> tuple[bool, JobOrigin | None]:
        """As the store's `put`; the checkpoints of a result that is replaced are removed.

        Returns:
            Whether there was a file of this name, and the job that had made it.

        Raises:
            PrefixError: As the store's `put`, or the folder cannot be read; nothing was changed.
        """
        replaced, origin = name in self.store, self.store.origin(name)
        self.store.put(name, source)
        now = self.store.origin(name)
        for other, left in self._beside(name).items():
            # Without a result before, they are what an earlier change has left.
            if left.id != (now and now.id) and (origin is None or left.id == origin.id):
                try:
                    self._remove([other])
                except PrefixError as error:
                    # The prefix itself is there.
                    log("checkpoint_not_removed", level=logging.ERROR, model=other, reason=error.message)
        return replaced, origin

    def _remove(self, names: Sequence[str]) -> tuple[str, ...]:
        for name in names:
            # Somebody else may have deleted it.
            with contextlib.suppress(RequestError):
                self.store.delete(name)
        return tuple(names)

    def _beside(self, name: str) -> dict[str, JobOrigin]:
        """The checkpoints that are called after a name, each with its job."""
        found = self.store.origins().items()
        return {other: one for other, one in found if other.startswith(f"{name}.step-") and one.step is not None}


def _not_served(error: PrefixError, name: str) -> ApiError:
    if isinstance(error, RequestError):
        return not_found("model", name)
    if not isinstance(error, CheckpointError):
        return unavailable(f"the file of {name!r} cannot be read now; try again later.", "busy", retry_after=5)
    # The reason is for admins only: it may name paths and models of whoever made the file.
    return unavailable(f"the file of {name!r} is not served; /v1/models tells an admin why.", "model_not_served")
