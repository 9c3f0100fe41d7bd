"""Paths with a `~`, and where everything is kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from prefixtune.errors import ConfigError

__all__ = ["cache_folder", "expand_home"]


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
    if home := os.environ.get("PREFIXTUNE_HOME"):
        return expand_home(home)
    folder = expand_home(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    if str(folder).startswith("~"):
        raise ConfigError(
            "this user has no home folder, and so no cache folder.", hint="set PREFIXTUNE_HOME to a folder to write to."
        )
    return folder / "prefixtune"
