"""Where everything is kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from prefixtune.errors import ConfigError
from prefixtune.utils.home import expand_home

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for everything that can be made again: `$PREFIXTUNE_HOME`, or the user's cache folder.

    Without `PREFIXTUNE_HOME` it is `$XDG_CACHE_HOME/prefixtune`, or else `~/.cache/prefixtune`. Makes nothing.

    Raises:
        ConfigError: None of these is known.
    """
    if home := os.environ.get("PREFIXTUNE_HOME"):
        return expand_home(home)
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return expand_home(cache) / "prefixtune"
    try:
        return Path.home() / ".cache" / "prefixtune"
    except RuntimeError as error:
        raise ConfigError(
            "this user has no home folder, and so no cache folder.", hint="set PREFIXTUNE_HOME to a folder to write to."
        ) from error
