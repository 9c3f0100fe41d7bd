"""A prefix's keys and values, once in memory for all running sequences that have the prefix."""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from weakref import WeakKeyDictionary

import torch

from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import KeyValue, Prefix

__all__ = ["SharedPrefix", "SharedPrefixes"]


MIN_LENGTH = 64
"""Positions of the shortest prefix that is shared. Attention to a shorter one would take longer, by a sixth at 10
positions, and its copies take little memory."""


@dataclass(frozen=True, eq=False)
class SharedPrefix:
    """Keys and values of one site, in the dtype and on the device of the slots.

    Attributes:
        layers: Per layer, keys (H, P, Dk) and values (H, P, Dv), contiguous.
    """

    layers: Sequence[KeyValue]

    @property
    def length(self) -> int:
        """P."""
        return int(self.layers[0][0].shape[1])

    @property
    def num_bytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in chain.from_iterable(self.layers))

    @cached_property
    def pointers(self) -> ctypes.Array[ctypes.c_void_p]:
        """Per layer, where its keys and its values are."""
        tensors = list(chain.from_iterable(self.layers))
        return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))


class SharedPrefixes:
    """Makes one `SharedPrefix` of a long prefix, however many sequences ask for it.

    A prefix whose tensors have the right dtype, device and layout is not copied: they must not change meanwhile. Of any
    other one there is a copy, as long as a sequence has it.

    Args:
        site: The attention whose keys and values are wanted.
        dtype: Of keys and values.
        device: Of keys and values.
    """

    def __init__(self, site: Site, dtype: torch.dtype, device: torch.device) -> None:
        self.site, self.dtype, self.device = site, dtype, device
        self._shared: WeakKeyDictionary[Prefix, weakref.ref[SharedPrefix]] = WeakKeyDictionary()

    def get(self, prefix: Prefix) -> SharedPrefix | None:
        """The prefix's keys and values; None: it is short, or has none at this site."""
        if prefix.length(self.site) < MIN_LENGTH:
            return None
        reference = self._shared.get(prefix)
        shared = None if reference is None else reference()
        if shared is None:
            layers = prefix.layers[self.site]
            shared = SharedPrefix(tuple((self._convert(key), self._convert(value)) for key, value in layers))
            self._shared[prefix] = weakref.ref(shared)
        return shared

    def _convert(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.device, self.dtype).contiguous()

    @property
    def num_bytes(self) -> int:
        """Memory of the keys and values that sequences have now, in bytes."""
        alive = (reference() for reference in list(self._shared.values()))
        return sum(shared.num_bytes for shared in alive if shared is not None)
