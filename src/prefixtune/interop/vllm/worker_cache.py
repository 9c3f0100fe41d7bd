"""The prefixes that a worker has loaded or joined: each layer's keys and values, in a cache of bounded size."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.interop.vllm.joining import join_prefixes
from prefixtune.interop.vllm.reference import PrefixPart, PrefixReference, version_of
from prefixtune.interop.vllm.settings import Settings
from prefixtune.prefix.file import is_unread
from prefixtune.prefix.folder import path_of
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, read_artifact

__all__ = ["KeyValues", "WorkerCache"]


_MAX_UNUSABLE = 4096

KeyValues = list[tuple[Float[Tensor, "P _H D"], Float[Tensor, "P _H D"]]]
"""Per layer, the keys and values of this rank's KV heads."""


class WorkerCache:
    """Reads prefixes, joins them, and keeps those used last.

    Args:
        settings: The folder, and how much memory the prefixes may take.
        shapes: The model's layers.
        heads: The KV heads of this worker's tensor-parallel rank.
        device: Where the KV cache is.
        dtype: Of the KV cache.
    """

    def __init__(
        self,
        settings: Settings,
        shapes: tuple[LayerShape, ...],
        heads: slice,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.settings, self.shapes, self.heads, self.device, self.dtype = settings, shapes, heads, device, dtype
        self._loaded: OrderedDict[PrefixReference, tuple[KeyValues, int]] = OrderedDict()
        self._num_bytes = 0
        self._unusable: OrderedDict[PrefixReference, str] = OrderedDict()

    def get(self, reference: PrefixReference) -> KeyValues:
        """The keys and values of a prefix, or of several, one after the other.

        Raises:
            CheckpointError: A file has been replaced, or cannot be used, or not be read now; the message says which.
            OSError: A file cannot be read.
        """
        entry = self._loaded.get(reference)
        if entry is not None:
            self._loaded.move_to_end(reference)
            return entry[0]
        if reference in self._unusable:
            raise CheckpointError(self._unusable[reference])
        key_values = self._read(reference)
        num_bytes = sum(tensor.numel() * tensor.element_size() for pair in key_values for tensor in pair)
        self._loaded[reference] = key_values, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self.settings.cache_bytes and len(self._loaded) > 1:
            self._num_bytes -= self._loaded.popitem(last=False)[1][1]
        return key_values

    def _read(self, reference: PrefixReference) -> KeyValues:
        with tempfile.TemporaryDirectory(prefix="prefixtune-") as private:
            copies = [Path(private) / f"{index}.safetensors" for index in range(len(reference.parts))]
            for part, copy in zip(reference.parts, copies, strict=True):
                self._copy(part, copy)
            try:
                prefixes, names = (
                    [read_artifact(copy).detach() for copy in copies],
                    [part.name for part in reference.parts],
                )
                return self._convert(prefixes[0] if len(prefixes) == 1 else join_prefixes(prefixes, names))
            except PrefixError as error:
                if is_unread(error):
                    # It may pass, so it is not remembered.
                    raise CheckpointError(f"{reference.name!r} cannot be read now.", hint="try again.") from error
                # The next request does not read it again.
                message = error.message
                for part, copy in zip(reference.parts, copies, strict=True):
                    message = message.replace(repr(str(copy)), f"the file of {part.name!r}")
                self._unusable[reference] = message
                if len(self._unusable) > _MAX_UNUSABLE:
                    self._unusable.popitem(last=False)
                raise CheckpointError(message, hint=error.hint) from error

    def _copy(self, part: PrefixPart, copy: Path) -> None:
        """Copy a prefix's file: reading maps it into memory, and somebody may write to it meanwhile."""
        source = path_of(self.settings.prefixes, part.name)
        before = version_of(source)
        shutil.copyfile(source, copy)
        if not before == part.version == version_of(source):
            raise CheckpointError(
                f"the file of {part.name!r} was replaced while the request waited.", hint="send it again."
            )

    def _convert(self, prefix: Prefix) -> KeyValues:
        if prefix.geometry != {"decoder": self.shapes}:
            raise CheckpointError("its shapes are not the model's.", hint="get the file again.")
        key_values = [(self._move(key), self._move(value)) for key, value in prefix.layers["decoder"]]
        if not all(bool(torch.isfinite(tensor).all()) for pair in key_values for tensor in pair):
            raise CheckpointError(f"it holds numbers that {self.dtype} cannot hold.", hint="serve in bfloat16.")
        return key_values

    def _move(self, tensor: Float[Tensor, "H P D"]) -> Float[Tensor, "P _H D"]:
        return tensor[self.heads].transpose(0, 1).to(self.device, self.dtype).contiguous()
