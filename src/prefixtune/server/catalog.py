"""All models by name: the prefixes, those that are joined, and the bare backbone, as far as a caller may use them."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import translate
from pathlib import Path
from typing import Any, BinaryIO

from prefixtune.data import TASKS
from prefixtune.errors import BackboneError, ConfigError, PrefixError, RequestError
from prefixtune.prefix.folder import path_of, signature_of
from prefixtune.prefix.header import JobOrigin
from prefixtune.prefix.prefix import Prefix
from prefixtune.prefix.routing import router
from prefixtune.server.auth import Caller
from prefixtune.server.prefixes import PrefixFile, PrefixFolder, not_served
from prefixtune.server.responses import bad_request, forbidden, not_found, unavailable
from prefixtune.server.settings import ServeConfig

SEPARATOR = "+"
"""Between the names of joined prefixes; no file's name may have it."""
ROUTE = "route:"
"""Before a pattern of names of memories, of which one answers; no file's name may have it."""
_LONGEST_PATTERN = 512
_BACKBONE = PrefixFile(None, {"description": "the bare backbone"})
"""What stands for the file of the bare backbone."""


@dataclass(frozen=True, eq=False)
class ServedModel:
    """A model that a request names.

    Attributes:
        names: Its name; of joined prefixes each one's.
        prefix: None for the bare backbone.
        header: Of the prefix's file, or of the joined prefix.
    """

    names: tuple[str, ...]
    prefix: Prefix | None = None
    header: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Its name; of joined prefixes all names, with a + between them."""
        return SEPARATOR.join(self.names)

    @property
    def prefix_length(self) -> int:
        """P, of the decoder; 0 without a prefix."""
        return 0 if self.prefix is None else self.prefix.length()


class Catalog:
    """The models by name. Methods may wait for the disk, so they are not for the event loop.

    What a job made is its owner's and an admin's, or everybody's where no key is configured; all else goes by the
    patterns of keys.

    Args:
        store: The prefixes; the bare backbone's name hides one of that name.
        config: The server's configuration.
        max_length: Most positions of a text, prefix included.
    """

    def __init__(self, store: PrefixFolder, config: ServeConfig, max_length: int) -> None:
        self.store, self.max_length, self.max_joined = store, max_length, config.max_joined_prefixes
        self.backbone_id, self.is_open, self.created = config.model_id, not config.keys, int(time.time())

    # --- who may do what ----------------------------------------------------------------------------------------------

    def check_owner(self, name: str, origin: JobOrigin | None, caller: Caller) -> None:
        """Refuse to copy or change a prefix that no job of the caller's made, unless the caller is an admin.

        Raises:
            ApiError: 403.
        """
        if not self._is_theirs(origin, caller, nobodys=caller.rules.admin):
            raise forbidden(f"{name[:128]!r} was made by no job of the key {caller.name!r}.", "not_the_owner")

    def files(self, names: Sequence[str], caller: Caller) -> dict[str, PrefixFile]:
        """The files of names that the caller may use; they may be files that are not served.

        What a job made for somebody else is answered like a name that there is not.

        Raises:
            ApiError: 403 or 404.
        """
        found = {name: _BACKBONE if name == self.backbone_id else self.store.file(name) for name in names}
        for name, file in found.items():
            if not (caller.may_use(name) or (file and self._is_theirs(file.origin, caller))):
                raise forbidden(f"the key {caller.name!r} may not use the model {name[:128]!r}.", "model_not_allowed")
        for name, file in found.items():
            if file is None or not self._is_theirs(file.origin, caller, nobodys=True):
                raise not_found("model", name)
        return {name: file for name, file in found.items() if file is not None}

    def _is_theirs(self, origin: JobOrigin | None, caller: Caller, *, nobodys: bool = False) -> bool:
        if origin is None:
            return nobodys
        return self.is_open or caller.rules.admin or origin.owner == caller.name

    # --- getting one --------------------------------------------------------------------------------------------------

    def parts(self, model: str, prefixes: Sequence[str] | None = None) -> tuple[str, ...]:
        """The names within a model's name, or those of prefixes to join: one or several.

        Raises:
            ApiError: They cannot be joined, whatever they are.
        """
        if prefixes is None:
            # The name of a backbone may have a +, that of a prefix cannot.
            names = (model,) if model == self.backbone_id else tuple(model.split(SEPARATOR))
        elif model in ("", self.backbone_id, SEPARATOR.join(prefixes)):
            names = tuple(prefixes)
        else:
            message = f"the model is {model[:128]!r}, but 'prefixes' names others."
            raise bad_request(message, "model", hint=f"leave it out, or write {self.backbone_id!r}.")
        if len(names) > self.max_joined:
            message = f"{len(names)} prefixes are named, but this server joins at most {self.max_joined}."
            raise bad_request(message, "model", "too_many_prefixes")
        if len(names) > 1 and ("" in names or self.backbone_id in names or len(set(names)) < len(names)):
            raise bad_request("joined names must be those of prefixes, each once, as in manual+user-42.", "model")
        return names

    def load(self, model: str, caller: Caller, prefixes: Sequence[str] | None = None) -> ServedModel:
        """The model of that name, with its prefix loaded.

        Args:
            model: Its name, or those of several prefixes to join, as in `manual+user-42`.
            caller: Who must be allowed to use all of them.
            prefixes: The names of the prefixes instead; `model` is then empty, theirs, or the bare backbone's.

        Raises:
            ApiError: The caller may not use it, there is none, or prefixes cannot be joined.
            PrefixError: As the folder's `load`.
        """
        names = self.parts(model, prefixes)
        files = self.files(names, caller)
        if _BACKBONE in files.values():
            return ServedModel(names)
        # A decoder's text follows its prefix; those of an encoder-decoder take none of its positions.
        length = sum(file.header.get("prefix_length", {}).get("decoder", 0) for file in files.values())
        if len(files) > 1 and self.store.backbone.kind != "encoder-decoder" and length >= self.max_length:
            message = f"the joined prefixes take {length} positions, but the limit is {self.max_length}, text included."
            raise bad_request(message, "model", "context_length_exceeded", hint="join fewer of them.")
        try:
            prefix = self.store.load(files)
        except (RequestError, BackboneError, ConfigError) as error:
            raise bad_request(error.message, "model", hint=error.hint) from None
        except PrefixError:
            # It may have been deleted, or replaced by another owner's, since it was looked at: then there is none.
            self.files(names, caller)
            raise
        return ServedModel(names, prefix, prefix.header)

    def route(self, model: str, text: str, caller: Caller) -> str:
        """The name of the memory that a text is about, by its stored questions; the bare backbone's, if it is none.

        Args:
            model: `route:` and a name or a pattern, as in `route:manual-*`, which the memories to choose from fit.
            text: The last of the user's.
            caller: Who must be allowed to use them.

        Raises:
            ApiError: No memory with stored questions fits that the caller may use.
        """
        pattern = model.removeprefix(ROUTE)
        # A very long one takes seconds; and `fnmatchcase` would keep thousands of them.
        fits = re.compile(translate(pattern[:_LONGEST_PATTERN])).match
        headers = {n: f.header for n, f in self._listed(caller).items() if fits(n) and f.header.get("questions")}
        if not headers or len(pattern) > _LONGEST_PATTERN:
            raise not_found("model", model)
        number = router(list(headers.values()), list(headers))(text)
        return self.backbone_id if number is None else list(headers)[number]

    def load_header(self, model: str, caller: Caller) -> Mapping[str, Any]:
        """The header of a model's file, or of joined prefixes; empty for the bare backbone.

        Raises:
            ApiError, PrefixError: As `load`.
        """
        if len(self.parts(model)) > 1:
            return self.load(model, caller).header
        return self._served(model, caller).header

    def _served(self, name: str, caller: Caller) -> PrefixFile:
        file = self.files((name,), caller)[name]
        if file.reason:
            raise not_served(name)
        return file

    def open(self, name: str, caller: Caller) -> BinaryIO:
        """The file of a prefix, to be read: for the owner of the job that made it, and for admins.

        Raises:
            ApiError: 403: it is not the caller's; 404: there is none; 503: it was replaced just now.
            CheckpointError: It is not served.
        """
        if name == self.backbone_id:
            raise bad_request("the bare backbone has no file of a prefix.", "name")
        file = self._owned(name, caller)
        if file.reason:
            raise not_served(name)
        try:
            opened = open(path_of(self.store.folder, name), "rb")  # noqa: SIM115
        except OSError:
            raise not_found("model", name) from None
        # By its path it could be another owner's, as soon as this one is deleted.
        if signature_of(opened.fileno()) != file.signature:
            opened.close()
            raise unavailable(f"the file of {name!r} was replaced; try again.", "busy", retry_after=5)
        return opened

    def _owned(self, name: str, caller: Caller) -> PrefixFile:
        """A prefix of the caller's, or any for an admin, whatever its patterns."""
        file = self.store.file(name) if caller.rules.admin else self.files((name,), caller)[name]
        if file is None:
            raise not_found("model", name)
        self.check_owner(name, file.origin, caller)
        return file

    # --- describing them ----------------------------------------------------------------------------------------------

    def describe_all(self, caller: Caller) -> list[dict[str, Any]]:
        """The models that a caller may use, the bare backbone first; checkpoints of jobs are left out."""
        return [self._describe(name, file) for name, file in self._listed(caller).items()]

    def _listed(self, caller: Caller) -> dict[str, PrefixFile]:
        files = {self.backbone_id: _BACKBONE, **{n: f for n, f in self.store.files().items() if n != self.backbone_id}}
        return {
            name: file
            for name, file in files.items()
            if not file.reason
            and (caller.may_use(name) if file.origin is None else self._is_theirs(file.origin, caller))
            and (file.origin is None or file.origin.step is None)
        }

    def describe(self, model: str, caller: Caller) -> dict[str, Any]:
        """A model as `/v1/models` lists it, or joined prefixes, which it does not list.

        Raises:
            ApiError, PrefixError: As `load`.
        """
        if len(self.parts(model)) == 1:
            return self._describe(model, self._served(model, caller))
        joined = self.load(model, caller)
        lengths = joined.prefix.lengths if joined.prefix is not None else {}
        facts = {"prefix_length": lengths, "description": f"{len(joined.names)} prefixes, joined in this order"}
        return {**self._describe(joined.name, PrefixFile(None, {**joined.header, **facts})), "kind": "joined"}

    def _describe(self, name: str, file: PrefixFile) -> dict[str, Any]:
        header, task, is_bare = file.header, file.header.get("task"), file is _BACKBONE
        taken = header.get("prefix_length", {}).get("decoder", 0) if self.store.backbone.kind == "decoder" else 0
        described = {
            # What OpenAI's and vLLM's clients read of a model.
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "prefixtune",
            "root": name,
            "parent": None if is_bare else self.backbone_id,
            "max_model_len": max(0, self.max_length - taken),
            "kind": "backbone" if is_bare else "prefix",
            "description": header.get("description") or (TASKS[task].description if task in TASKS else "a prefix"),
            "task": task,
            **{key: header[key] for key in ("prefix_length", "license") if header.get(key)},
        }
        if file.origin is not None and file.signature is not None:
            described |= {"created": file.signature[0] // 10**9, "owned_by": file.origin.owner, "job": file.origin.id}
        return described

    # --- changing them ------------------------------------------------------------------------------------------------

    def delete(self, model: str, caller: Caller) -> None:
        """Remove what a job made, a result together with its checkpoints; admins remove any prefix.

        Raises:
            ApiError: There is no such model, or it is not the caller's.
            PrefixError: A file cannot be removed.
        """
        if model == self.backbone_id:
            raise forbidden(f"{model[:128]!r} is the bare backbone, which is not deleted.", "model_not_deletable")
        origin = self._owned(model, caller).origin
        # The name itself comes last: if something fails, it can be deleted again.
        self._delete_checkpoints(model, origin)
        self._delete(model)

    def upload(self, name: str, source: Path) -> bool:
        """Add a file or replace the one of that name, whose checkpoints go if the new one is no result of their job.

        Returns:
            Whether there was one of that name.

        Raises:
            PrefixError: As `PrefixFolder.put`.
        """
        old = self.store.file(name)
        self.store.put(name, source)
        if old is not None and self.store.origins().get(name) != old.origin:
            self._delete_checkpoints(name, old.origin)
        return old is not None

    def _delete_checkpoints(self, model: str, origin: JobOrigin | None) -> None:
        for name, one in self.store.origins().items():
            if origin is not None and one.id == origin.id and name.startswith(f"{model}.step-"):
                self._delete(name)

    def _delete(self, name: str) -> None:
        # Somebody else may have deleted it.
        with contextlib.suppress(RequestError):
            self.store.delete(name)
