"""What a prefix file is checked by before it is served: its header against the backbone, then all of its tensors."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.errors import CheckpointError, PrefixError
from prefixtune.prefix.folder import ENDING
from prefixtune.prefix.prefix import Prefix, read_outline
from prefixtune.prefix.serving import incompatibilities

__all__ = ["PrefixValidator"]


class PrefixValidator:
    """Reads and checks prefix files for one backbone.

    Args:
        backbone: The model that they must fit; one without weights, from `load_tokenizer`, fits every header.
        max_bytes: Largest prefix, in the backbone's dtype.
        allow_other_backbone: Accept prefixes that were trained for other weights, if the shapes fit.
    """

    def __init__(self, backbone: Backbone, max_bytes: int, *, allow_other_backbone: bool = False) -> None:
        self.backbone, self.max_bytes, self.allow_other_backbone = backbone, max_bytes, allow_other_backbone

    def read_header(self, path: Path) -> str:
        """Check a file by its header alone; returns the header as JSON.

        Raises:
            CheckpointError: It is not a prefix, does not fit the backbone, or is too large.
            OSError: It cannot be read.
        """
        outline = read_outline(path)
        if not self.backbone.geometry:
            # Without its weights, a backbone's shapes are unknown: whoever loads it compares them.
            return json.dumps(outline.header, ensure_ascii=False)
        fingerprint = None if self.allow_other_backbone else self.backbone.fingerprint
        reasons = incompatibilities(outline, self.backbone.geometry, self.backbone.name, fingerprint, classifies=True)
        width = self.backbone.head_size
        if outline.head is not None and outline.head.weight.shape[1] != width:
            reasons.append(f"its head is not for hidden states of {width} numbers")
        num_bytes = outline.num_parameters * self.backbone.dtype.itemsize
        if num_bytes > self.max_bytes:
            reasons.append(f"it takes {num_bytes:,} bytes, but all prefixes together may take {self.max_bytes:,}")
        if reasons:
            raise CheckpointError(f"{'; '.join(reasons)}.", hint="use `prefixtune inspect` to see what it is.")
        return json.dumps(outline.header, ensure_ascii=False)

    def load_copy(self, path: Path, name: str) -> Prefix:
        """Read and check a whole file, from a copy: others may write to the file meanwhile.

        Raises:
            CheckpointError: It is broken or does not fit the backbone.
            PrefixError: It cannot be read now.
        """
        try:
            with tempfile.TemporaryDirectory(prefix="prefixtune-") as folder:
                copy = Path(folder) / f"{name}{ENDING}"
                shutil.copyfile(path, copy)
                return self.load(copy, name)
        except OSError as error:
            raise PrefixError(f"cannot read the prefix {name!r} now: {error.strerror}.", hint="try again.") from error

    def load(self, path: Path, name: str) -> Prefix:
        """Read and check a whole file that nobody else writes to; messages contain the name instead of the path.

        Raises:
            CheckpointError: It is broken or does not fit the backbone.
        """
        try:
            loaded = load_prefix(path, self.backbone, allow_other_backbone=self.allow_other_backbone)
            # A copy, which is not mapped from the file, and which the engine reads as it is.
            prefix = loaded.detach().to(self.backbone.dtype, self.backbone.device)
        except PrefixError as error:
            raise CheckpointError(error.message.replace(str(path), name), hint=error.hint) from error
        if not prefix.is_finite():
            raise CheckpointError(
                f"{name!r} has numbers that are too large for {self.backbone.dtype}.",
                hint="serve in float32 or bfloat16.",
            )
        return prefix
