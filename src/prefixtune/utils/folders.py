"""Paths with a `~`, and the user's folders for what is kept."""

from __future__ import annotations

import os
from pathlib import Path

from prefixtune.errors import ConfigError


def expand_home(path: str | os.PathLike[str]) -> Path:
    """A path with its `~` or `~USER` replaced; as in a shell, it stays as it is where there is no such user."""
    # Path.expanduser raises a RuntimeError there.
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Return the folder for everything that can be made again: `$PREFIXTUNE_HOME`, or the user's cache folder.

    Without `PREFIXTUNE_HOME` it is `$XDG_CACHE_HOME/prefixtune`, or else `~/.cache/prefixtune`. Makes nothing.

    Raises:
        ConfigError: None of these is known.
    """
    return _folder("", "XDG_CACHE_HOME", "~/.cache")


def data_folder() -> Path:
    """Return the folder for what is kept without being told where: `$PREFIXTUNE_HOME/data`, or the user's data folder.

    Without `PREFIXTUNE_HOME` it is `$XDG_DATA_HOME/prefixtune`, or else `~/.local/share/prefixtune`. Makes nothing.

    Raises:
        ConfigError: None of these is known.
    """
    return _folder("data", "XDG_DATA_HOME", "~/.local/share")


def _folder(below: str, variable: str, usual: str) -> Path:
    if home := os.environ.get("PREFIXTUNE_HOME"):
        return expand_home(home) / below
    folder = expand_home(os.environ.get(variable) or usual)
    if str(folder).startswith("~"):
        raise ConfigError("this user has no home folder to write to.", hint="set PREFIXTUNE_HOME to a folder.")
    return folder / "prefixtune"
