"""Tell backbones apart before their weights are read, and where there are none; and name them without their paths."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from prefixtune.backbone.lora import ADAPTER_CONFIG
from prefixtune.backbone.packaged import PRETRAINED
from prefixtune.errors import BackboneError

__all__ = ["backbone_identity", "public_name"]


_LENGTH = 12


def backbone_identity(name: str) -> str:
    """Identify the backbone that a name stands for; the same on every machine that has the same files.

    Of a folder or a .gguf file its own name and its configuration count, not where it lies; of an embedded backbone or
    a hub id, that. Two trainings of one architecture whose folders have the same name look alike: compare fingerprints
    once their weights are there.

    Args:
        name: As for `load_backbone`.

    Returns:
        12 hexadecimal digits.

    Raises:
        BackboneError: Its configuration cannot be read.
    """
    path = Path(name)
    facts = [name]
    try:
        if name not in PRETRAINED and path.exists():
            facts = [path.absolute().name]
            if path.is_file():
                facts.append(str(path.stat().st_size))
            for config in (path / "config.json", path / ADAPTER_CONFIG):
                if config.is_file():
                    facts.append(hashlib.sha256(config.read_bytes()).hexdigest())
    except OSError as error:
        raise BackboneError(
            f"the configuration of {name!r} cannot be read: {error.strerror or error}.", hint="check its permissions."
        ) from error
    return hashlib.sha256(json.dumps(facts).encode("utf-8", "surrogateescape")).hexdigest()[:_LENGTH]


def public_name(name: str, called: str = "") -> str:
    """The name of a backbone in what others get: that of a hub id or an embedded one, by which they can load it too.

    Args:
        name: As for `load_backbone`.
        called: In place of a local folder or file; empty: its own name, never its path.
    """
    if name in PRETRAINED or not Path(name).exists():
        return name
    return called or os.path.basename(os.path.abspath(name)).removesuffix(".gguf") or "backbone"
