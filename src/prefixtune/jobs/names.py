"""What results of jobs and their checkpoints are served as."""

from __future__ import annotations

import re

from prefixtune.errors import RequestError
from prefixtune.prefix.folder import check_name

__all__ = ["check_result_name", "checkpoint_name"]


_MAX_LENGTH = 112
"""Longest name of a result, so that `.step-N` can follow it."""
_CHECKPOINT = re.compile(r"\.step-[0-9]+\Z")


def checkpoint_name(name: str, step: int) -> str:
    """What a checkpoint of a result is served as.

    >>> checkpoint_name("support", 40)
    'support.step-40'
    """
    return f"{name}.step-{step}"


def check_result_name(name: str) -> None:
    """Refuse names that no result can have.

    Raises:
        RequestError: It is no name of a prefix, too long, or that of a checkpoint.
    """
    check_name(name)
    if len(name) > _MAX_LENGTH:
        raise RequestError(
            f"the name {name[:32]!r}... has {len(name)} characters.", hint=f"use at most {_MAX_LENGTH} characters."
        )
    if _CHECKPOINT.search(name):
        raise RequestError(
            f"{name!r} is a name for a checkpoint.", hint="use a name that does not end with '.step-' and a number."
        )
