"""All models by name: the prefixes and the bare backbone, as far as a caller may use and see them."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.data import TASKS
from prefixtune.data.encoding import default_format
from prefixtune.errors import CheckpointError, PrefixError, RequestError
from prefixtune.prefix.header import JobOrigin, job_origin
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.text_format import TextFormat, read_text_format
from prefixtune.server.auth import Caller
from prefixtune.server.logs import log
from prefixtune.server.models.access import ModelAccess
from prefixtune.server.models.joined import SEPARATOR, JoinsInUseError, PrefixJoiner
from prefixtune.server.models.store import PrefixStore
from prefixtune.server.models.task_schema import task_decoding, task_schema_of
from prefixtune.server.responses import ApiError, bad_request, forbidden, not_found, unavailable
from prefixtune.server.threads import FairThreads

__all__ = ["Catalog", "ServedModel"]


_TEXTS = ("task", "description")
"""Texts of a header; it comes from outside, and anything may be in their place."""
_THREADS = 4
"""Prefixes that are read or joined at once, of which one tenant has half."""


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
    """The models by name.

    Args:
        store: The prefixes.
        backbone: The model.
        backbone_id: The bare backbone's name.
        created: When the server started, in seconds since 1970.
        max_joined: Most prefixes that are joined.
        max_length: Most positions of a text, prefix included.
        is_open: Whether no key is configured: results of jobs are then everybody's.
        finds_new: Whether the folder is looked at for an unknown name and for a list, where a job may just have put a
            file.

    Attributes:
        joiner: Joins prefixes.
        access: Who may use which name.
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
        finds_new: bool = False,
    ) -> None:
        self.store, self.backbone, self.backbone_id, self.created = store, backbone, backbone_id, created
        self.max_joined, self.max_length = max_joined, max_length
        self.finds_new = finds_new
        self.joiner = PrefixJoiner(store, backbone, max_length)
        self.access = ModelAccess(store, backbone_id, is_open=is_open)
        self._threads = FairThreads(_THREADS, "prefixtune-prefixes")
        # Of its own: a prefix in memory waits for nothing that is read or deleted.
        self._quick_threads = FairThreads(_THREADS, "prefixtune-loaded")
        # Also of its own: a deletion may wait for others who change the folder.
        self._deleting_threads = FairThreads(_THREADS, "prefixtune-deleting")

    def close(self) -> None:
        """Load no more; what is being loaded goes on."""
        for threads in (self._threads, self._quick_threads, self._deleting_threads):
            threads.close()

    def names(self, caller: Caller) -> list[str]:
        """The models that a caller may use, the bare backbone first; checkpoints of jobs are left out."""
        prefixes = [name for name in self.store.names() if name != self.backbone_id]
        listed = [name for name in prefixes if not self.access.is_checkpoint(name)]
        return [name for name in (self.backbone_id, *listed) if self.access.may_use(name, caller)]

    def parts(self, model: str, prefixes: Sequence[str] | None = None) -> tuple[str, ...]:
        """The names within a model's name, or those of prefixes to join: one or several.

        Raises:
            ApiError: They cannot be joined, whatever they are.
        """
        if prefixes is not None and model not in (self.backbone_id, SEPARATOR.join(prefixes)):
            raise bad_request(
                f"the model is {model[:128]!r}, but 'prefixes' names others.",
                "model",
                hint=f"leave it out, or write {self.backbone_id!r}.",
            )
        # The name of a backbone may have a +, that of a prefix cannot.
        names = (
            tuple(model.split(SEPARATOR) if model != self.backbone_id else [model])
            if prefixes is None
            else (*prefixes,)
        )
        if len(names) > 1:
            self._check_names(names, "model" if prefixes is None else "prefixes")
        return names

    def _check_names(self, names: Sequence[str], param: str) -> None:
        """Refuse names that are not joined."""
        if len(names) > self.max_joined:
            message = f"{len(names)} prefixes are named, but this server joins at most {self.max_joined}."
            if self.max_joined == 1:
                message = f"{len(names)} prefixes are named, but this server joins none (max_joined_prefixes is 1)."
            raise bad_request(message, param, "too_many_prefixes")
        if "" in names:
            raise bad_request(
                "one of the joined names is empty.", param, hint="write one + between two names, as in manual+user-42."
            )
        for name in names:
            if name == self.backbone_id:
                raise bad_request(f"{name[:128]!r} is the bare backbone, and only prefixes are joined.", param)
            if names.count(name) > 1:
                raise bad_request(f"the prefix {name[:128]!r} is named twice.", param, hint="name each of them once.")

    def may_use(self, model: str, caller: Caller) -> bool:
        """Whether there is such a model, and the caller may use it: of joined prefixes, every one."""
        names = [model] if model == self.backbone_id else model.split(SEPARATOR)
        return all(self.access.is_known(name) and self.access.may_use(name, caller) for name in names)

    async def look(self, name: str, tenant: str) -> None:
        """Look for an unknown name in the folder, where a job may just have put it."""
        if self.finds_new and not self.access.is_known(name):
            await self._threads.run(tenant, partial(self.store.look, name))

    async def look_for_new(self, tenant: str) -> None:
        """Look for all files that a job may just have put into the folder."""
        if self.finds_new:
            # What is known is answered, whatever the folder is like.
            with contextlib.suppress(PrefixError):
                await self._threads.run(tenant, self.store.look_for_new)

    async def check_access(self, names: Sequence[str], caller: Caller, tenant: str) -> None:
        """Refuse names of which the caller may not use one, whether there is such a model or not.

        What a job made for somebody else is answered like a name that there is not.

        Args:
            names: As `parts` returns them.
            caller: Whose key the request has.
            tenant: Whose turn it is.

        Raises:
            ApiError: 403 or 404.
        """
        for name in names:
            await self.look(name, tenant)
        for name in names:
            if not (caller.may_use(name) or self.access.owns(name, caller)):
                raise forbidden(f"the key {caller.name!r} may not use the model {name[:128]!r}.", "model_not_allowed")
        for name in names:
            if not (self.access.is_known(name) and self.access.may_use(name, caller)):
                raise self._unknown(name, caller)

    def _unknown(self, name: str, caller: Caller) -> ApiError:
        # Suggests only names that the caller may see.
        return not_found("model", name, self.names(caller) if self.store.has_few else None)

    async def load(
        self, model: str, caller: Caller, prefixes: Sequence[str] | None = None, *, tenant: str | None = None
    ) -> ServedModel:
        """The model of that name, with its prefix loaded.

        One that is in memory waits for no other; those that are read or joined take turns by tenants.

        Args:
            model: Its name, or those of several prefixes to join, as in `manual+user-42`.
            caller: Who must be allowed to use all of them.
            prefixes: The names of the prefixes instead; `model` is then theirs or the bare backbone's.
            tenant: Whose turn it is; None: the caller's.

        Raises:
            ApiError: The caller may not use it, there is none, its file is broken, or prefixes cannot be joined.
        """
        names, tenant = self.parts(model, prefixes), caller.name if tenant is None else tenant
        await self.check_access(names, caller, tenant)
        if names == (self.backbone_id,):
            return ServedModel(self.backbone_id)
        loaded = await self._quick_threads.run(tenant, partial(self._find_loaded, names, caller))
        if loaded is not None:
            return loaded
        param = "model" if prefixes is None else "prefixes"
        return await self._threads.run(tenant, partial(self._load, names, caller, param))

    def _find_loaded(self, names: tuple[str, ...], caller: Caller) -> ServedModel | None:
        """The model, if all of it is in memory."""
        parts: list[Prefix] = []
        for name in names:
            part = self.store.loaded(name)
            if part is None:
                return None
            self._check_header(name, part.header, caller)
            parts.append(part)
        prefix = parts[0] if len(parts) == 1 else self.joiner.joined(parts)
        return None if prefix is None else self._served(names, prefix)

    def _load(self, names: tuple[str, ...], caller: Caller, param: str) -> ServedModel:
        loaded = [self._load_one(name, caller) for name in names]
        if len(names) == 1:
            return self._served(names, loaded[0])
        try:
            prefix = self.joiner.join(names, loaded)
        except RequestError as error:
            raise bad_request(error.message, param, "context_length_exceeded", hint=error.hint) from None
        except JoinsInUseError as error:
            raise unavailable(f"{error.message} Try again later.", "busy", retry_after=1) from None
        except PrefixError as error:
            raise bad_request(error.message, param, "cannot_join", hint=error.hint) from None
        return self._served(names, prefix)

    def _served(self, names: tuple[str, ...], prefix: Prefix) -> ServedModel:
        return ServedModel(SEPARATOR.join(names), prefix, prefix.header, names if len(names) > 1 else ())

    def _load_one(self, name: str, caller: Caller) -> Prefix:
        try:
            prefix = self.store.get(name)
        except PrefixError as error:
            raise _not_served(error, name) from None
        self._check_header(name, prefix.header, caller)
        return prefix

    def _check_header(self, name: str, header: Mapping[str, Any], caller: Caller) -> None:
        """Refuse a file that the caller may not use, and that has replaced the one that `check_access` knew.

        Raises:
            ApiError: 404.
        """
        if not self.access.may_use_header(name, header, caller):
            raise self._unknown(name, caller)

    async def load_header(self, model: str, caller: Caller, *, tenant: str | None = None) -> Mapping[str, Any]:
        """The header of a model's file, or of joined prefixes; empty for the bare backbone. Arguments as of `load`.

        Raises:
            ApiError: As `load`.
        """
        names = self.parts(model)
        if len(names) > 1:
            return (await self.load(model, caller, tenant=tenant)).header
        await self.check_access(names, caller, caller.name if tenant is None else tenant)
        header = self.header(model)
        if model != self.backbone_id:
            self._check_header(model, header, caller)
        return header

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
                models.append(self.describe(name, caller))
        return models

    async def describe_one(self, model: str, caller: Caller, *, tenant: str | None = None) -> dict[str, Any]:
        """A model as `/v1/models` lists it; joined prefixes, which are not listed, too. Arguments as of `load`.

        Raises:
            ApiError: As `load`.
        """
        names = self.parts(model)
        if len(names) == 1:
            await self.check_access(names, caller, caller.name if tenant is None else tenant)
            return self.describe(model, caller)
        joined = await self.load(model, caller, tenant=tenant)
        prefix, task = joined.prefix, joined.header.get("task")
        return {
            **self._model(joined.name, joined.prefix_length),
            "kind": "joined",
            "description": f"{len(joined.parts)} prefixes, joined in this order",
            "task": task if isinstance(task, str) else None,
            "prefix_length": prefix.lengths if prefix else {},
        }

    def describe(self, name: str, caller: Caller) -> dict[str, Any]:
        """A model as `/v1/models` lists it.

        Raises:
            ApiError: The prefix does not exist any more or is somebody else's, or its file is broken.
        """
        if name == self.backbone_id:
            return {**self._model(name), "kind": "backbone", "description": "the bare backbone", "task": None}
        header = self.header(name)
        self._check_header(name, header, caller)
        task, description = (header.get(key) if isinstance(header.get(key), str) else None for key in _TEXTS)
        if description is None:
            description = TASKS[task].description if task in TASKS else "a prefix"
        types = {"prefix_length": dict, "license": str}
        more = {key: header[key] for key, kind in types.items() if header.get(key) and isinstance(header[key], kind)}
        length = more.get("prefix_length", {}).get("decoder")
        model = self._model(name, length if type(length) is int else 0)
        origin = job_origin(header)
        if origin is not None:
            model |= {"created": self.store.modified(name), "owned_by": origin.owner, "job": origin.id}
        return {**model, "kind": "prefix", "description": description, "task": task, **more}

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

    async def delete(self, model: str, caller: Caller, tenant: str) -> tuple[str, ...]:
        """Remove what a job made, a result together with its checkpoints; admins remove any prefix.

        Args:
            model: Its name.
            caller: Its owner, or an admin.
            tenant: Whose turn it is.

        Returns:
            The names that are gone.

        Raises:
            ApiError: There is no such model, or it is not the caller's.
            PrefixError: A file cannot be removed.
        """
        if model != self.backbone_id and SEPARATOR in model:
            raise self._unknown(model, caller)
        await self.check_access((model,), caller, tenant)
        if model == self.backbone_id:
            raise forbidden(f"{model[:128]!r} is the bare backbone, which is not deleted.", "model_not_deletable")
        return await self._deleting_threads.run(tenant, partial(self._delete, model, caller))

    def _delete(self, name: str, caller: Caller) -> tuple[str, ...]:
        self.store.refresh(name)
        if not (caller.rules.admin or self.access.owns(name, caller)):
            raise forbidden(f"{name[:128]!r} was made by no job of this key.", "not_the_owner")
        # The name itself comes last: if something fails, it can be deleted again.
        return self._remove([*self._checkpoints(name), name])

    def remove(self, name: str) -> tuple[str, ...]:
        """Remove a prefix, whoever made it, a result together with its checkpoints; blocks.

        Returns:
            The names that are gone.

        Raises:
            PrefixError: A file cannot be removed.
        """
        self.store.refresh(name)
        return self._remove([*self._checkpoints(name), name])

    def put(self, name: str, source: Path) -> tuple[bool, JobOrigin | None]:
        """As the store's `put`; the checkpoints of a result that is replaced are removed. Blocks.

        Returns:
            Whether there was a file of this name, and the job that had made it.

        Raises:
            PrefixError: As the store's `put`, or the folder cannot be read; nothing was changed.
        """
        self.store.refresh(name)
        replaced, origin = name in self.store or name in self.store.refused, self.store.origin(name)
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

    def _checkpoints(self, name: str) -> list[str]:
        """The checkpoints of the job that made a result; empty for any other prefix."""
        result = self.store.origin(name)
        if result is None or result.step is not None:
            return []
        return [other for other, origin in self._beside(name).items() if origin.id == result.id]

    def _beside(self, name: str) -> dict[str, JobOrigin]:
        """The checkpoints that are called after a name, each with its job."""
        known = (*self.store.names(), *self.store.refused)
        origins = {other: self.store.origin(other) for other in known if other.startswith(f"{name}.step-")}
        return {other: origin for other, origin in origins.items() if origin is not None and origin.step is not None}

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
    if not isinstance(error, CheckpointError):
        return unavailable(f"the file of {name!r} cannot be read now; try again later.", "busy", retry_after=5)
    # The reason is for admins only: it may name paths and models of whoever made the file.
    return unavailable(f"the file of {name!r} is not served; /admin/prefixes says why.", "model_not_served")
