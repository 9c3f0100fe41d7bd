"""The prefixes that a worker has loaded: each layer's keys and values, in a cache of bounded size."""

from __future__ import annotations

import shutil
import tempfile
from collections import OrderedDict
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from prefixtune.errors import CheckpointError
from prefixtune.prefix.folder import PrefixReference, Signature, hash_file, path_of, signature_of
from prefixtune.prefix.geometry import LayerShape
from prefixtune.prefix.prefix import Prefix, read_artifact

KeyValues = list[tuple[Float[Tensor, "P _H D"], Float[Tensor, "P _H D"]]]
"""Per layer, the keys and values of this rank's KV heads."""
_MOST_OTHER = 1024


class PrefixCache:
    """Reads prefixes, and keeps those used last.

    Args:
        folder: Where their files are.
        max_bytes: Most memory that they may take together.
        shapes: The model's layers.
        heads: The KV heads of this worker's tensor-parallel rank.
        device: Where the KV cache is.
        dtype: Of the KV cache.
    """

    def __init__(
        self,
        folder: Path,
        max_bytes: int,
        shapes: tuple[LayerShape, ...],
        heads: slice,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.shapes, self.heads, self.device, self.dtype = shapes, heads, device, dtype
        # By content, whatever the file's name; and the hashes of files that requests named with another one.
        self._loaded: OrderedDict[tuple[str, int], tuple[KeyValues, int]] = OrderedDict()
        self._other: OrderedDict[tuple[str, Signature | None], str] = OrderedDict()
        self._num_bytes = 0

    def get(self, reference: PrefixReference) -> KeyValues:
        """The keys and values of a prefix.

        Raises:
            PrefixError: Its file is missing or another one, or cannot be used with this model.
            OSError: It cannot be read.
        """
        content = reference.sha256, reference.length
        entry = self._loaded.get(content)
        if entry is not None:
            self._loaded.move_to_end(content)
            return entry[0]
        key_values = self._read(reference)
        num_bytes = sum(tensor.nbytes for pair in key_values for tensor in pair)
        self._loaded[content] = key_values, num_bytes
        self._num_bytes += num_bytes
        while self._num_bytes > self.max_bytes and len(self._loaded) > 1:
            self._num_bytes -= self._loaded.popitem(last=False)[1][1]
        return key_values

    def _read(self, reference: PrefixReference) -> KeyValues:
        path = path_of(self.folder, reference.name)
        version = reference.name, signature_of(path)
        wrong = CheckpointError("its file is another one than the request names.", hint="name the new one.")
        # Whoever names a wrong one again and again does not have it read each time.
        if self._other.get(version, reference.sha256) != reference.sha256:
            raise wrong
        with tempfile.TemporaryDirectory(prefix="prefixtune-") as private:
            # A copy: reading maps the file into memory, and somebody may write to it meanwhile.
            copy = Path(private) / "copy.safetensors"
            shutil.copyfile(path, copy)
            if (sha256 := hash_file(copy)) != reference.sha256:
                self._other[version] = sha256
                if len(self._other) > _MOST_OTHER:
                    self._other.popitem(last=False)
                raise wrong
            return self._convert(read_artifact(copy).detach(), reference)

    def _convert(self, prefix: Prefix, reference: PrefixReference) -> KeyValues:
        if prefix.geometry != {"decoder": self.shapes}:
            raise CheckpointError("its shapes are not the model's.", hint="use a prefix of this model.")
        if prefix.length() != reference.length:
            raise CheckpointError(f"it has {prefix.length()} positions, not {reference.length}.", hint="say so.")
        key_values = [(self._move(key), self._move(value)) for key, value in prefix.layers["decoder"]]
        if not all(bool(torch.isfinite(tensor).all()) for pair in key_values for tensor in pair):
            raise CheckpointError(f"it holds numbers that {self.dtype} cannot hold.", hint="serve in bfloat16.")
        return key_values

    def _move(self, tensor: Float[Tensor, "H P D"]) -> Float[Tensor, "P _H D"]:
        return tensor[self.heads].transpose(0, 1).to(self.device, self.dtype).contiguous()
