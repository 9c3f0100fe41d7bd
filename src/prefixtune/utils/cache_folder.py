"""Where everything is kept that can be made again."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """Return the folder for everything that can be made again: `$PREFIXTUNE_HOME`, or the user's cache folder.

    Without `PREFIXTUNE_HOME` it is `$XDG_CACHE_HOME/prefixtune`, or else `~/.cache/prefixtune`. Makes nothing.
    """
    if home := os.environ.get("PREFIXTUNE_HOME"):
        return Path(home).expanduser()
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache).expanduser() / "prefixtune"
    return Path.home() / ".cache" / "prefixtune"
