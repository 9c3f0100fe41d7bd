"""What all exports share: refusing what another runtime cannot use, and the manifest that goes with the files."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.backbone.prefixes import load_prefix
from prefixtune.backbone.shapes import check_plain_layers
from prefixtune.data.chat import literal_format
from prefixtune.data.encoding import format_of
from prefixtune.errors import BackboneError, ConfigError
from prefixtune.prefix.prefix import Prefix
from prefixtune.training.run_folder import CONFIG_FILE, PREFIX_FILE

MANIFEST, README = "export.json", "README.md"

_HINT = "use `prefixtune generate` or `prefixtune serve` for it."


def check_folder(folder: str | Path, target: str) -> None:
    """Refuse a folder that an export would mix with a run, a model or another export, or whose README it would replace.

    Raises:
        ConfigError: It holds such a file, and no export to this target.
    """
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["target"] == target:
            return
    for name in (CONFIG_FILE, PREFIX_FILE, MANIFEST, README, "config.json", "model.onnx"):
        if os.path.exists(Path(folder) / name):
            raise ConfigError(f"{str(folder)!r} holds a {name}.", hint="name a folder of its own.")


def check_exportable(prefix: Prefix, backbone: Backbone, target: str) -> None:
    """Refuse what another runtime would compute wrongly, or what was never tested.

    Raises:
        BackboneError: The backbone is not a plain decoder whose layers all keep keys and values of one shape, turned
            alike in every text, and see the whole text, or the prefix does not fit it.
        ConfigError: The prefix is empty, holds NaN, or has a head.
    """
    name = backbone.name
    if backbone.kind != "decoder":
        raise BackboneError(f"{target} takes decoder-only models; {name!r} is an {backbone.kind}.", hint=_HINT)
    load_prefix(prefix, backbone)
    check_prefix(prefix, target)
    check_plain_layers(backbone, target)


def check_prefix(prefix: Prefix, target: str) -> None:
    """Refuse a prefix that another runtime would compute wrongly, whatever the backbone.

    Raises:
        ConfigError: It is empty, holds NaN, or has a head.
    """
    if prefix.head is not None:
        what = f"the prefix has a head for labels, which reads hidden states; {target} returns the scores of tokens."
        raise ConfigError(what, hint="`prefixtune train --classifier words` has labels that the model writes.")
    if prefix.prefix_length == 0:
        raise ConfigError("the prefix has no positions (P = 0).", hint=f"use the backbone alone in {target}.")
    if not prefix.is_finite():
        raise ConfigError("the prefix holds NaN or infinity.", hint="train it again.")


def describe_origin(prefix: Prefix, backbone: Backbone) -> dict[str, Any]:
    """The manifest's part about the backbone, the prefix and its text format."""
    trained = format_of(backbone, prefix)
    text_format = literal_format(backbone, trained)
    return {
        "backbone": {"name": backbone.name, "fingerprint": backbone.fingerprint},
        "model_type": backbone.model.config.model_type,
        "prefix_length": prefix.prefix_length,
        "positions": "text starts at position P",
        "text_format": {"prompt": text_format.format_prompt("{source}", backbone.separator), "target": trained.target},
        "end": trained.end if trained.is_chat else backbone.end,
        **{key: prefix.header[key] for key in ("task", "license") if prefix.header.get(key)},
    }


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `export.json` into the folder of the exported files."""
    (folder / MANIFEST).write_text(json.dumps(facts, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
