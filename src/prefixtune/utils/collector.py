"""Python's garbage collector in a program that starts, works and ends."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

__all__ = ["keeping_objects", "not_collecting", "seldom_collecting"]


_THRESHOLD = 10_000
"""New objects before the collector looks for unreachable ones; Python's own value is 700."""


@contextlib.contextmanager
def seldom_collecting() -> Iterator[None]:
    """While the block runs, look for unreachable objects more seldom.

    Importing torch and transformers makes a million objects that stay until the end. At Python's own threshold a sixth
    of a short command is spent on looking at them again and again. The interpreter looks once more when it ends:
    libraries such as triton tell of leaks where it may not.
    """
    usual = gc.get_threshold()
    gc.set_threshold(_THRESHOLD, *usual[1:])
    try:
        yield
    finally:
        gc.set_threshold(*usual)


@contextlib.contextmanager
def not_collecting() -> Iterator[None]:
    """While the block runs, look for no unreachable objects: for imports and models, of which all is kept."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextlib.contextmanager
def keeping_objects() -> Iterator[None]:
    """While the block runs, never look at the objects that are there when it begins.

    For a program that has loaded all that it needs: else each full collection looks at a million objects of torch and
    transformers, and stops all threads for half a second.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
