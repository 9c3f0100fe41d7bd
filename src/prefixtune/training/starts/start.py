"""The start of a run's prefix: what it is before the first step, and what the header says of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from prefixtune.backbone.backbone import Backbone
from prefixtune.errors import ConfigError
from prefixtune.prefix.geometry import Site, spell_lengths
from prefixtune.prefix.prefix import Prefix

__all__ = ["Start", "by_site", "check_lengths", "lengths_from"]


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


def lengths_from(wanted: Mapping[Site, int], actual: Mapping[Site, int]) -> dict[Site, int]:
    """P of each site of a run that starts from a prefix: what the run gives it, or else that of the prefix.

    Args:
        wanted: What the run gives each site; 0: nothing.
        actual: P of each site of the prefix.
    """
    return {site: length or actual.get(site, 0) for site, length in wanted.items()}


def check_lengths(actual: Mapping[Site, int], wanted: Mapping[Site, int]) -> None:
    """Refuse a start with other positions than the run trains.

    Args:
        actual: P of each site of the prefix to start from.
        wanted: The run's prefix length at each site.

    Raises:
        ConfigError: Its sites or lengths are others.
    """
    if actual != wanted:
        raise ConfigError(
            f"the prefix to start from has length {spell_lengths(actual)}, but the run has {spell_lengths(wanted)}.",
            hint=f"set prefix_length, or sites, to {spell_lengths(actual)}, or cut the prefix first.",
        )
