"""A compiled source, loaded and checked."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

__all__ = ["NativeLibrary"]


class NativeLibrary(ABC):
    """The functions of a compiled source, which compute what they should.

    Args:
        path: The shared library.

    Attributes:
        structures: What its functions take, by the name of the function that tells the size that the source has of it.

    Raises:
        OSError: It cannot be loaded, was compiled from another version's source, or computes something else.
        AttributeError: A function is missing.
    """

    structures: ClassVar[dict[str, type[ctypes.Structure]]] = {}

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))
        for name, structure in self.structures.items():
            size = getattr(library, name)
            size.restype = ctypes.c_int64
            if size() != ctypes.sizeof(structure):
                raise OSError(f"{path} was compiled for another version: remove it.")
        self.bind(library)
        # Whatever else this process computes on, and in a thread of its own.
        import torch

        with torch.device("cpu"):
            is_right = self.computes()
        if not is_right:
            raise OSError(f"{path} computes something else: remove it, or use another compiler.")

    def __deepcopy__(self, memo: object) -> NativeLibrary:
        """Itself: copies of a model share the functions that its modules call."""
        return self

    @abstractmethod
    def bind(self, library: ctypes.CDLL) -> None:
        """Keep the library's functions, with their types.

        Raises:
            AttributeError: One is missing.
        """

    @abstractmethod
    def computes(self) -> bool:
        """Whether small cases have the results of torch's own operations."""
