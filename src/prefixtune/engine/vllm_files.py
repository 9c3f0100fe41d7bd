"""The folder in which vLLM finds prefixes: a file for each one that is asked for, named by its content."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from prefixtune.errors import ConfigError
from prefixtune.prefix.prefix import Prefix, save_prefix
from prefixtune.prefix.reference import PrefixReference, hash_file
from prefixtune.utils.files import reporting_write_errors, work_folder
from prefixtune.utils.folders import cache_folder

__all__ = ["PrefixFiles", "own_folder"]


_MAX_BYTES = 2**30
"""Beyond them, the files that were not used for longest are removed."""


@dataclass(eq=False)
class _File:
    """A file in the folder, and how many texts need it."""

    reference: PrefixReference
    num_bytes: int
    users: int = 0


class PrefixFiles:
    """Writes prefixes into a folder. May be used from any thread.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._references: weakref.WeakKeyDictionary[Prefix, PrefixReference] = weakref.WeakKeyDictionary()
        # By name, the last used one at the end.
        self._files: OrderedDict[str, _File] = OrderedDict()
        self._numbers = itertools.count()
        self._lock = threading.Lock()

    def take(self, prefix: Prefix) -> PrefixReference:
        """Write a prefix's file if there is none; it stays until `release`.

        Raises:
            PrefixError: It cannot be written.
        """
        with self._lock:
            reference = self._references.get(prefix)
            if reference is None or not reference.path(self.folder).exists():
                reference = self._references[prefix] = self._write(prefix)
            file = self._files.setdefault(reference.name, _File(reference, 4 * prefix.num_parameters))
            file.users += 1
            self._files.move_to_end(reference.name)
            self._drop()
            return reference

    def release(self, reference: PrefixReference) -> None:
        """A text that needed the file has ended."""
        with self._lock:
            if (file := self._files.get(reference.name)) is not None:
                file.users -= 1

    def close(self) -> None:
        """Remove all files that were written."""
        with self._lock:
            for name in list(self._files):
                self._remove(name)

    def _write(self, prefix: Prefix) -> PrefixReference:
        made = self.folder / f"made-{os.getpid()}-{next(self._numbers)}.safetensors"
        save_prefix(made, prefix)
        with reporting_write_errors(made):
            digest = hash_file(made)
            reference = PrefixReference(digest, digest, prefix.length())
            made.replace(reference.path(self.folder))
        return reference

    def _drop(self) -> None:
        total = sum(file.num_bytes for file in self._files.values())
        for name, file in list(self._files.items()):
            if total <= _MAX_BYTES:
                return
            if not file.users:
                total -= file.num_bytes
                self._remove(name)

    def _remove(self, name: str) -> None:
        self._files.pop(name).reference.path(self.folder).unlink(missing_ok=True)


@contextlib.contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for one engine; those of processes that were killed are removed.

    Raises:
        ConfigError: The cache folder cannot be written.
    """
    parent = cache_folder() / "vllm"
    with contextlib.ExitStack() as made:
        try:
            parent.mkdir(parents=True, exist_ok=True)
            folder = made.enter_context(work_folder(parent, "prefixes"))
        except OSError as error:
            raise ConfigError(
                f"cannot write to {str(parent)!r}: {error.strerror or error}.", hint="set PREFIXTUNE_HOME."
            ) from error
        yield folder
