"""What `compose` and `cut` share: reading prefixes, how their keys turn, and storing the result."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixtune.errors import ConfigError
from prefixtune.utils.console import Console

if TYPE_CHECKING:
    from prefixtune.backbone.backbone import Backbone
    from prefixtune.prefix.prefix import Prefix
    from prefixtune.prefix.rotation import Rotation

__all__ = ["find_rotation", "load_backbone_of", "part_rows", "read_prefixes", "save_composed"]


def read_prefixes(files: Sequence[str]) -> list[Prefix]:
    """Read prefixes.

    Raises:
        PrefixError: One is missing or wrong.
    """
    from prefixtune.backbone.prefixes import load_prefix

    return [load_prefix(file) for file in files]


def find_rotation(console: Console, prefixes: Sequence[Prefix], files: Sequence[str], backbone: str | None) -> Rotation:
    """How keys turn with position: found by running the backbone, if it is given, or as the headers have it.

    Raises:
        PrefixError: No backbone is named, it cannot be loaded, or its keys cannot be moved.
    """
    from prefixtune.prefix.compose import stored_rotation

    stored = None if backbone else stored_rotation(prefixes, files)
    return stored or load_backbone_of(console, prefixes, files, backbone).rotation


def load_backbone_of(
    console: Console, prefixes: Sequence[Prefix], files: Sequence[str], backbone: str | None
) -> Backbone:
    """The backbone that the prefixes name, or the one given, checked against them.

    Raises:
        PrefixError: None is named, it cannot be loaded, or a prefix was trained for another.
    """
    from prefixtune.backbone.load import check_loadable, load_backbone
    from prefixtune.backbone.prefixes import load_prefix
    from prefixtune.prefix.header import backbone_origin

    named = (backbone_origin(prefix.header).name for prefix in prefixes)
    name = backbone or next(filter(None, named), "")
    if not name:
        raise ConfigError(f"{files[0]!r} does not name its backbone.", hint="name it: --backbone NAME.")
    check_loadable(name, device="cpu")
    console.info(f"loading {name} ...")
    loaded = load_backbone(name, dtype="auto", device="cpu")
    for prefix in prefixes:
        load_prefix(prefix, loaded)
    return loaded


def save_composed(path: Path, prefix: Prefix) -> int:
    """Store a prefix in its own dtype; returns the file's size in bytes."""
    import platform

    import torch

    from prefixtune import __version__
    from prefixtune.prefix.artifact import save_prefix
    from prefixtune.prefix.prefix import Prefix

    versions = {"prefixtune": __version__, "torch": torch.__version__, "python": platform.python_version()}
    dtype = prefix.dtype if prefix.dtype in (torch.bfloat16, torch.float16) else torch.float32
    save_prefix(path, Prefix(prefix.layers, {**prefix.header, "made_with": versions}, prefix.head), dtype=dtype)
    return path.stat().st_size


def part_rows(parts: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table of a composed prefix's parts."""
    from prefixtune.prefix.composition import MAX_PARTS

    weighted = any("weight" in part for part in parts)
    columns = ["part", "length", *(["weight"] if weighted else []), "task", "dev loss", "hash"]
    rows = []
    for part in parts[:MAX_PARTS]:
        lengths = part.get("prefix_length")
        spelled = ", ".join(f"{site} {n}" for site, n in lengths.items()) if isinstance(lengths, Mapping) else "?"
        loss = part.get("dev_loss")
        rows.append(
            [_shown(part.get("name", "?")), _shown(spelled.removeprefix("decoder "))]
            + ([_shown(part.get("weight", ""))] if weighted else [])
            + [
                _shown(part.get("task", "")),
                f"{loss:.4g}" if isinstance(loss, float) else "" if loss is None else _shown(loss),
            ]
            + [str(part.get("hash", ""))[:19]]
        )
    return columns, rows


def _shown(value: object) -> str:
    """A text of a header, which may come from anybody, for a cell of a table."""
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
