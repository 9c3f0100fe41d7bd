"""Paths with a `~`."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["expand_home"]


def expand_home(path: str | os.PathLike[str]) -> Path:
    """A path with its `~` or `~USER` replaced; as in a shell, it stays as it is where there is no such user."""
    # Path.expanduser raises a RuntimeError there.
    return Path(os.path.expanduser(path))
