"""The start of a run's prefix: what it is before the first step, and what the header says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.prefix.geometry import Site
from prefixtune.prefix.prefix import Prefix

__all__ = ["Start", "by_site"]


@dataclass(frozen=True)
class Start:
    """What a run's prefix starts from.

    Attributes:
        prefix: In float32; None: random numbers.
        description: What the header says of it: its `kind` and more.
        blocks: By index of a training example that the prefix was made from: the positions `[first, stop)` of its
            block in the prefix.
    """

    prefix: Prefix | None
    description: dict[str, Any]
    blocks: Mapping[int, tuple[int, int]] = field(default_factory=dict)


def by_site(backbone: Backbone, prefix_length: int | Mapping[Site, int]) -> dict[Site, int]:
    """P of all sites of a backbone, or of those that are named."""
    if isinstance(prefix_length, int):
        return dict.fromkeys(backbone.geometry, prefix_length)
    return dict(prefix_length)
