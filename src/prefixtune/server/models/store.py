"""A folder of prefixes, NAME.safetensors each, that are served by name from a bounded cache.

Looking through the folder reads headers only; a prefix is read, and wholly checked, when it is first asked for. A bad
file is reported and left out. A file that was replaced takes effect for who asks from then on; whoever has a prefix
keeps it. Knows nothing of requests.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError, PrefixError, RequestError, did_you_mean
from prefixtune.prefix.artifact import read_outline, reasons_against
from prefixtune.prefix.folder import ENDING, Signature, check_name, check_place, list_names, path_of, signature_of
from prefixtune.prefix.prefix import Prefix
from prefixtune.utils.files import atomic_path

__all__ = ["PrefixStore", "StoreStats"]


_log = logging.getLogger(__name__)
_REASON_LENGTH = 500


@dataclass(frozen=True)
class StoreStats:
    """How the cache fares.

    Attributes:
        hits: Prefixes that were asked for and were at hand.
        misses: Those that had to be read.
        evictions: Those that had to make room.
        bytes: What the prefixes at hand take.
        loaded: How many they are.
        known: Files that can be served.
        refused: Files that cannot.
    """

    hits: int
    misses: int
    evictions: int
    bytes: int
    loaded: int
    known: int
    refused: int


@dataclass(frozen=True)
class _Known:
    """A file as it was when its header was read; the header as text, which takes the least memory."""

    signature: Signature
    header: str


class PrefixStore:
    """Prefixes by name, from a folder. May be used from any thread.

    Args:
        folder: Made where it is missing.
        backbone: The model that they are for.
        max_bytes: Most that the prefixes at hand may take together, in the backbone's dtype.
        allow_other_backbone: Accept prefixes of a sister model whose shapes fit.

    Raises:
        PrefixError: The folder cannot be made or read.
    """

    def __init__(
        self, folder: str | Path, backbone: Backbone, *, max_bytes: int = 2**30, allow_other_backbone: bool = False
    ) -> None:
        self.folder, self.backbone = Path(folder).absolute(), backbone
        self.max_bytes, self.allow_other_backbone = max_bytes, allow_other_backbone
        self._known: dict[str, _Known] = {}
        self._refused: dict[str, tuple[Signature | None, str]] = {}
        self._cache: OrderedDict[str, tuple[Signature, Prefix]] = OrderedDict()
        self._bytes = self._hits = self._misses = self._evictions = 0
        # Held for moments only: whoever asks for what is at hand never waits for a disk.
        self._lock = threading.Lock()
        # One reads or writes files at a time.
        self._files = threading.Lock()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unreadable(error) from error
        self.reload()

    # --- what is there ------------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Look through the folder: new files, replaced ones, those that are gone.

        Raises:
            PrefixError: The folder itself cannot be read; what was known stays known.
        """
        with self._files:
            try:
                found = list_names(self.folder)
            except OSError as error:
                raise _unreadable(error) from error
            for name in sorted(found):
                self._look(name)
            with self._lock:
                for name in (self._known.keys() | self._refused.keys()) - found:
                    self._forget(name)

    def names(self) -> list[str]:
        """Every name that can be asked for, in order."""
        with self._lock:
            return sorted(self._known)

    def __contains__(self, name: object) -> bool:
        with self._lock:
            return name in self._known

    def __len__(self) -> int:
        with self._lock:
            return len(self._known)

    def header(self, name: str) -> dict[str, Any]:
        """What the artifact says of itself; its tensors were not read for it.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file was refused.
        """
        with self._lock:
            header: dict[str, Any] = json.loads(self._find(name).header)
        return header

    @property
    def refused(self) -> dict[str, str]:
        """Names of files that are not served, and why."""
        with self._lock:
            return {name: reason for name, (_, reason) in sorted(self._refused.items())}

    @property
    def stats(self) -> StoreStats:
        """How the cache fares."""
        with self._lock:
            return StoreStats(
                hits=self._hits,
                misses=self._misses,
                evictions=self._evictions,
                bytes=self._bytes,
                loaded=len(self._cache),
                known=len(self._known),
                refused=len(self._refused),
            )

    # --- getting one --------------------------------------------------------------------------------------------------

    def get(self, name: str) -> Prefix:
        """A prefix, in the backbone's dtype and on its device.

        Raises:
            RequestError: There is no such prefix.
            CheckpointError: Its file is broken, or was replaced by one that is.
            PrefixError: Its file cannot be read now.
        """
        with self._lock:
            if name not in self._known and name not in self._refused:
                raise self._missing(name)
        signature = self._signature(name)
        held = self._at_hand(name, signature)
        if held is not None:
            return held
        with self._files:
            # Somebody else may have read it meanwhile.
            signature = self._signature(name)
            held = self._at_hand(name, signature)
            if held is not None:
                return held
            self._look(name)
            with self._lock:
                known = self._find(name)
                self._misses += 1
            try:
                prefix = self._read(self._path(name), name)
            except CheckpointError as error:
                self._refuse(name, known.signature, error.message)
                raise
            self._keep(name, known.signature, prefix)
            return prefix

    def _at_hand(self, name: str, signature: Signature | None) -> Prefix | None:
        with self._lock:
            held = self._cache.get(name)
            if held is None or held[0] != signature:
                return None
            self._hits += 1
            self._cache.move_to_end(name)
            return held[1]

    def _keep(self, name: str, signature: Signature, prefix: Prefix) -> None:
        with self._lock:
            self._drop(name)
            self._cache[name] = (signature, prefix)
            self._bytes += prefix.num_bytes
            while self._bytes > self.max_bytes:
                self._drop(next(iter(self._cache)))
                self._evictions += 1

    # --- changing the folder ------------------------------------------------------------------------------------------

    def put(self, name: str, source: str | Path) -> None:
        """Take a file in under a name, in place of any that is there: wholly checked, then moved into place at once.

        Raises:
            RequestError: The name is not allowed.
            CheckpointError: The file is broken or does not fit the backbone; nothing was changed.
            PrefixError: It cannot be read, or the folder cannot be written; nothing was changed.
        """
        check_name(name)
        with self._files:
            try:
                self._parse(Path(source))
                # Checked wholly is the copy, which nobody else writes to.
                with atomic_path(self._path(name)) as temporary:
                    shutil.copyfile(source, temporary)
                    self._load(temporary, name)
            except OSError as error:
                raise PrefixError(f"cannot read the file for {name!r}: {error.strerror}.", hint="try again.") from error
            except CheckpointError as error:
                raise CheckpointError(
                    f"the file for {name!r} is not taken: {error.message}", hint=error.hint
                ) from error
            except PrefixError as error:
                raise PrefixError(self._without_paths(error.message), hint=error.hint) from error
            self._look(name)

    def delete(self, name: str) -> None:
        """Remove a prefix and its file; requests that have it go on.

        Raises:
            RequestError: There is no such prefix.
            PrefixError: The file cannot be removed.
        """
        with self._files:
            with self._lock:
                if name not in self._known and name not in self._refused:
                    raise self._missing(name)
            try:
                self._path(name).unlink(missing_ok=True)
            except OSError as error:
                raise PrefixError(
                    f"cannot remove {name!r}: {error.strerror}.", hint="check its permissions."
                ) from error
            with self._lock:
                self._forget(name)

    # --- files --------------------------------------------------------------------------------------------------------

    def _path(self, name: str) -> Path:
        return path_of(self.folder, name)

    def _signature(self, name: str) -> Signature | None:
        return signature_of(self._path(name))

    def _look(self, name: str) -> None:
        """Read a file's header if the file is new or another one; never raises for what is in it."""
        signature = self._signature(name)
        with self._lock:
            known, refused = self._known.get(name), self._refused.get(name)
            same = known is not None and known.signature == signature
            same |= refused is not None and refused[0] is not None and refused[0] == signature
            if same:
                return
        try:
            check_name(name)
            check_place(self.folder, name)
            header = self._parse(self._path(name))
        except FileNotFoundError:
            with self._lock:
                self._forget(name)
        except OSError as error:
            # May be of the moment only: looked at again the next time.
            self._refuse(name, None, f"it cannot be read: {error.strerror or error}")
        except PrefixError as error:
            self._refuse(name, signature, error.message)
        except Exception as error:
            # Whatever one file is, the others are looked at.
            _log.exception("a file of the folder of prefixes cannot be read.")
            self._refuse(name, signature, f"it cannot be read: {type(error).__name__}")
        else:
            if signature is not None:
                with self._lock:
                    self._forget(name)
                    self._known[name] = _Known(signature, header)

    def _parse(self, path: Path) -> str:
        """Read and check a file's header alone; returns what it says of itself, as JSON."""
        outline = read_outline(path)
        wanted = None if self.allow_other_backbone else self.backbone.fingerprint
        reasons = reasons_against(outline, self.backbone.geometry, self.backbone.name, wanted)
        needed = outline.num_elements * self.backbone.dtype.itemsize
        if needed > self.max_bytes:
            reasons.append(f"it takes {needed:,} bytes, but all prefixes together may take {self.max_bytes:,}")
        if reasons:
            raise CheckpointError(f"{'; '.join(reasons)}.", hint="use `prefixtune inspect` to see what it is.")
        return json.dumps(outline.header, ensure_ascii=False)

    def _read(self, path: Path, name: str) -> Prefix:
        """Read and wholly check a file, from a copy: it may be written to meanwhile."""
        try:
            with tempfile.TemporaryDirectory(prefix="prefixtune-") as folder:
                copy = Path(folder) / f"{name}{ENDING}"
                shutil.copyfile(path, copy)
                return self._load(copy, name)
        except OSError as error:
            raise PrefixError(f"cannot read the prefix {name!r} now: {error.strerror}.", hint="try again.") from error

    def _load(self, path: Path, name: str) -> Prefix:
        """Read and wholly check a file that nobody else writes to."""
        try:
            loaded = load_prefix(path, self.backbone, allow_other_backbone=self.allow_other_backbone)
            # A copy, which is not mapped from the file.
            prefix = loaded.detach().to(self.backbone.dtype, self.backbone.device)
        except PrefixError as error:
            raise CheckpointError(self._without_paths(error.message, path, name), hint=error.hint) from error
        if not prefix.is_finite():
            raise CheckpointError(
                f"{name!r} holds numbers that {self.backbone.dtype} cannot hold.", hint="serve in float32 or bfloat16."
            )
        return prefix

    # --- the books; the lock is held, but for `_refuse` ---------------------------------------------------------------

    def _find(self, name: str) -> _Known:
        known = self._known.get(name)
        if known is not None:
            return known
        if name in self._refused:
            raise CheckpointError(
                f"the prefix {name!r} is not served: {self._refused[name][1]}", hint="replace its file."
            )
        raise self._missing(name)

    def _missing(self, name: object) -> RequestError:
        told = str(name)[:128]
        # Looking for the nearest of very many would take long.
        hint = did_you_mean(told, self._known) if 0 < len(self._known) <= 50 else "ask for the list of names."
        return RequestError(f"there is no prefix {told!r}.", hint=hint)

    def _refuse(self, name: str, signature: Signature | None, reason: str) -> None:
        with self._lock:
            self._forget(name)
            self._refused[name] = (signature, self._without_paths(reason)[:_REASON_LENGTH])

    def _forget(self, name: str) -> None:
        self._known.pop(name, None)
        self._refused.pop(name, None)
        self._drop(name)

    def _drop(self, name: str) -> None:
        held = self._cache.pop(name, None)
        if held is not None:
            self._bytes -= held[1].num_bytes

    def _without_paths(self, message: str, source: str | Path | None = None, name: str = "") -> str:
        """A message with names in the place of paths: where files lie is nobody's business."""
        if source is not None:
            message = message.replace(str(source), name or Path(source).stem)
        return message.replace(f"{self.folder}{os.sep}", "").replace(str(self.folder), "the folder")


def _unreadable(error: OSError) -> PrefixError:
    return PrefixError(f"the folder of prefixes cannot be read: {error.strerror}.", hint="check its permissions.")
